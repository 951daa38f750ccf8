from __future__ import annotations

from typing import Any

from depthsearch.run.verdict import verdict


def row(arm: str, mean: float, method: str = "evolution") -> dict[str, Any]:
    return {
        "arm": arm,
        "method": method,
        "heldout_kl_mean": mean,
        "heldout_kl_low": mean - 0.01,
        "heldout_kl_high": mean + 0.01,
    }


def pair(a: str, b: str, better: str | None) -> dict[str, Any]:
    return {"a": a, "b": b, "verdict": f"{better} is better" if better else "no difference shown"}


def test_one_arm_alone_is_compared_with_nothing() -> None:
    text = verdict([row("evo", 0.5)], [])
    assert text == "evo has the lowest held-out KL, 0.5000 [0.4900, 0.5100]."


def test_a_search_that_beats_everything() -> None:
    rows = [row("greedy", 0.7, "greedy"), row("evo", 0.5), row("win", 0.6, "windows")]
    pairs = [pair("greedy", "evo", "evo"), pair("greedy", "win", "win"), pair("evo", "win", "evo")]
    text = verdict(rows, pairs)
    assert text.startswith("evo has the lowest held-out KL, 0.5000")
    assert "better than win and greedy (95 % interval excludes zero)" in text
    assert "No difference" not in text
    assert "did not help" not in text


def test_a_tie_with_a_one_pass_method_is_said_plainly() -> None:
    rows = [row("evo", 0.5), row("win", 0.51, "windows"), row("greedy", 0.9, "greedy")]
    pairs = [pair("evo", "win", None), pair("evo", "greedy", "evo"), pair("win", "greedy", "win")]
    text = verdict(rows, pairs)
    assert "It is better than greedy (" in text
    assert "No difference to win is shown." in text
    assert text.endswith("Search did not help over one-pass methods here.")


def test_a_tie_between_searches_alone_does_not_speak_of_one_pass_methods() -> None:
    rows = [row("evo", 0.5), row("greedy", 0.51, "greedy"), row("win", 0.9, "windows")]
    pairs = [pair("evo", "greedy", None), pair("evo", "win", "evo"), pair("greedy", "win", None)]
    text = verdict(rows, pairs)
    assert "better than win (" in text
    assert "No difference to greedy is shown." in text
    assert "did not help" not in text


def test_a_one_pass_method_that_wins_says_so_even_where_it_beats_the_search() -> None:
    ranked = (
        "windows", "block_influence", "similarity", "sensitivity", "single_removal", "additive",
    )  # fmt: skip
    for method in ("fixed", "angular_window", *ranked):
        rows = [row("evo", 0.6), row("simple", 0.5, method)]
        text = verdict(rows, [pair("evo", "simple", "simple")])
        assert text.startswith("simple has the lowest")
        assert "better than evo (" in text
        assert text.endswith("Search did not help over one-pass methods here.")


def test_three_names_are_listed_with_commas() -> None:
    rows = [row("a", 0.1), row("b", 0.2), row("c", 0.3), row("d", 0.4)]
    text = verdict(rows, [pair("a", "b", None), pair("c", "a", None), pair("a", "d", None)])
    assert "No difference to b, c and d is shown." in text
