from __future__ import annotations

from typing import Any

from depthsearch.run.stability_words import recommendation, verdict, warnings


def span(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


NONE = span(0, 0, 0)


def sample(name: str, kind: str, winner: int, regret: dict[str, float]) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "tokens": 1024,
        "winner": winner,
        "gap": 0.25,
        "mean_gap": 0.125,
        "regret": regret,
        "first_winner_excess": span(0, 0, 0) if winner == 0 else regret,
        "kendall": span(0.5, 0.4, 0.75),
    }


def size(tokens: int, share: float, above: dict[str, float]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "favourite": 0,
        "favourite_share": share,
        "best_share": share,
        "shares": [share, 1 - share],
        "regret": 0.02,
        "regret_stderr": 0.01,
        "above_lowest": above,
    }


def check(
    *samples: dict[str, Any], share: float = 0.95, enough: int = 1024, possible: int | None = None
) -> dict[str, Any]:
    return {
        "select_tokens": 1024,
        "best": 0,
        "heldout": {"wins": [0.96, 0.04]},
        "samples": list(samples),
        "agreement": {"draw": {"kendall": 0.625}},
        "sizes": [
            size(1024, share, span(0.03, 0.01, 0.05)),
            size(2048, share, span(0.003, -0.001, 0.007)),
            size(4096, 0.99, NONE),
        ],
        "configured": 0,
        "possible_tokens": possible or enough,
        "recommended_tokens": enough,
        "recommended_is_largest": enough == 4096,
    }


FIRST = sample("sample 1", "draw", 0, NONE)


def test_agreeing_samples_are_called_stable_with_the_gap_and_the_size() -> None:
    found = check(FIRST, sample("sample 2", "draw", 0, NONE))
    assert warnings(found) == []
    assert verdict(found) == (
        "The winner is stable: all 2 samples of 1,024 tokens name mask 1. Kendall's tau is 0.62 "
        "between samples and 0.50 to 0.50 with held-out text. From its sample to held-out text the "
        "loss of a winner changes by +0.2500 nats on average, that of all masks by +0.1250. "
        "calibration.select_tokens: 1024 is enough for these masks: from there on a winner is "
        "expected to lose 0.0500 nats of held-out loss at most to one of the best size (95 %)."
    )


def test_a_harmful_change_of_winner_is_told_from_a_harmless_one() -> None:
    harmful = check(FIRST, sample("sample 2", "draw", 1, span(0.2, 0.1, 0.3)))
    (text,) = warnings(harmful)
    assert text == (
        "The winner changes with the sample of text: 2 samples of 1,024 tokens name 2 winners "
        "(mask 1 once, mask 2 once). Trusting one sample costs 0.1000 nats of held-out loss on "
        "average, 0.2000 nats [0.1000, 0.3000] at worst (sample 2)."
    )
    (text,) = warnings(check(FIRST, sample("sample 2", "draw", 1, span(0.2, -0.1, 0.5))))
    assert "no difference between these winners and the best mask is shown" in text


def test_samples_that_agree_against_held_out_text_are_told() -> None:
    away = span(0.2, 0.1, 0.3)
    (text,) = warnings(check(*(sample(f"sample {n}", "draw", 1, away) for n in (1, 2))))
    assert text == (
        "All 2 samples name mask 2, which on one half of held-out text is behind the best mask of "
        "the other half by 0.2000 nats [0.1000, 0.3000]."
    )


def test_samples_that_agree_by_luck_are_not_called_stable() -> None:
    found = check(FIRST, sample("sample 2", "draw", 0, NONE), share=0.6)
    assert verdict(found).startswith(
        "The winner is not settled: all 2 samples name mask 1, but of resampled texts of 1,024 "
        "tokens only 60 % do."
    )
    (text,) = warnings(found)
    assert "60 % name the most frequent winner (mask 1)" in text
    assert "Trusting one costs 0.0200 ± 0.0100 nats" in text


def test_the_share_is_that_of_the_mask_that_the_samples_name() -> None:
    """Mask 1 wins most resampled texts, by far; the samples name mask 2 all the same."""
    away = sample("sample 1", "draw", 1, NONE)
    found = check(away, away | {"name": "sample 2"}, share=0.95)
    assert verdict(found).startswith(
        "The winner is not settled: all 2 samples name mask 2, but of resampled texts of 1,024 "
        "tokens only 5 % do."
    )


def test_another_length_counts_as_a_difference_only_where_one_is_shown() -> None:
    shown = sample("windows of 128", "length", 1, span(0.2, 0.1, 0.3))
    hidden = sample("songs.txt", "other", 1, span(0.2, -0.1, 0.3))
    first, second = warnings(check(FIRST, shown, hidden))
    assert first.endswith(
        "(windows of 128): mask 2 instead of mask 1, which on one half of that text is behind the "
        "best mask of the other half by 0.2000 nats [0.1000, 0.3000]."
    )
    assert second.endswith("[-0.1000, 0.3000], no difference that is shown.")


def test_a_size_that_is_not_enough_is_told() -> None:
    found = check(FIRST, enough=4096)
    assert warnings(found) == [
        "calibration.select_tokens is 1024, less than the 4096 that would do: raise it."
    ]
    assert recommendation(found) == (
        "Select on 4,096 tokens or more: winners on 2,048 are still shown to be worse, by 0.0030 "
        "nats [-0.0010, 0.0070] of held-out loss."
    )


def test_what_held_out_text_can_not_tell_is_called_undecided() -> None:
    found = check(FIRST, enough=4096, possible=1024)
    assert warnings(found) == []
    assert recommendation(found) == (
        "How much text is enough is not decided: from 1,024 tokens on no size is shown to be worse "
        "than the best, but one may lose 0.0500 nats of held-out loss to it. Select on 4,096 "
        "tokens, or raise calibration.heldout_tokens to tell."
    )
    found = check(FIRST, enough=2048, possible=1024)
    assert recommendation(found) == (
        "calibration.select_tokens: 2048 is enough for these masks: from there on a winner is "
        "expected to lose 0.0070 nats of held-out loss at most to one of the best size (95 %). "
        "Whether 1,024 tokens would do is not decided."
    )
    found = {**found, "sizes": found["sizes"][:1], "recommended_tokens": 1024}
    assert recommendation(found) == (
        "How much text is enough can't be told from one size, of 1,024 tokens."
    )
