from __future__ import annotations

from typing import Any

import pytest

from depthsearch.run.verdict import outcome, overall, verdict, warnings_of


def row(arm: str, mean: float, method: str = "evolution") -> dict[str, Any]:
    return {
        "arm": arm,
        "method": method,
        "heldout_kl_mean": mean,
        "heldout_kl_low": mean - 0.01,
        "heldout_kl_high": mean + 0.01,
    }


def pair(a: str, b: str, better: str | None, among: int = 9) -> dict[str, Any]:
    said = f"{better} is better" if better else "no difference shown"
    return {"a": a, "b": b, "verdict": said, "among": among if better else 0}


def test_one_arm_alone_is_compared_with_nothing() -> None:
    text = verdict([row("evo", 0.5)], [])
    assert text == "evo has the lowest held-out KL, 0.5000 [0.4900, 0.5100]."


def test_a_search_that_beats_everything() -> None:
    rows = [row("greedy", 0.7, "greedy"), row("evo", 0.5), row("win", 0.6, "windows")]
    pairs = [pair("greedy", "evo", "evo"), pair("greedy", "win", "win"), pair("evo", "win", "evo")]
    text = verdict(rows, pairs)
    assert text.startswith("evo has the lowest held-out KL, 0.5000")
    assert "better than win and greedy (at 95 % for all 3 pairs of arms together)" in text
    assert "No difference" not in text
    assert "did not help" not in text


def test_a_bad_method_whose_seeds_differ_widely_does_not_hide_what_search_gains() -> None:
    rows = [row("evo", 0.5), row("win", 0.6, "windows"), row("add", 3.0, "additive")]
    clear = pair("evo", "win", "evo") | {"difference": -0.1, "low": -0.12, "high": -0.08}
    pairs = [clear, pair("evo", "add", None), pair("win", "add", None)]
    assert "Search helped: evo is 0.1000 nats" in verdict(rows, pairs)


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


def test_a_lead_that_is_shown_alone_only_is_not_called_better() -> None:
    """There are three pairs to pick a leader from, and two of a search and a one-pass method."""
    rows = [row("evo", 0.5), row("greedy", 0.55, "greedy"), row("win", 0.6, "windows")]
    figures = {"difference": -0.1, "low": -0.12, "high": -0.01}
    for among, better, helped in ((3, True, True), (2, False, True), (1, False, False)):
        clear = pair("evo", "win", "evo", among) | figures
        text = verdict(rows, [clear, pair("evo", "greedy", None), pair("greedy", "win", None)])
        assert ("better than win (" in text) == better
        assert ("The lead on win is shown at 95 % only where that pair" in text) != better
        assert ("Search helped" in text) == helped
        assert "No difference to greedy is shown." in text


def test_arms_that_came_to_the_same_share_the_lead() -> None:
    rows = [row("evo", 0.5), row("greedy", 0.5, "greedy"), row("win", 0.6, "windows")]
    pairs = [
        pair("evo", "greedy", None),
        pair("evo", "win", "evo"),
        pair("greedy", "win", "greedy"),
    ]
    text = verdict(rows, pairs)
    assert text.startswith(
        "evo and greedy share the lowest held-out KL, 0.5000 [0.4900, 0.5100]. They are better "
        "than win ("
    )
    assert "No difference" not in text
    pairs = [pair("evo", "greedy", None), pair("evo", "win", "evo"), pair("greedy", "win", None)]
    assert "No difference to win is shown." in verdict(rows, pairs)


def test_arms_that_share_the_best_rank_are_all_named() -> None:
    ranks = [
        {"arm": arm, "rank_mean": mean, "rank_low": 1.0, "rank_high": 3.0, "first_share": 1 / 3}
        for arm, mean in (("evo", (4 / 3 + 5 / 3) / 2), ("greedy", 1.5), ("win", 3.0))
    ]
    assert overall([], ranks) == (
        "evo and greedy share the best mean rank over budgets and seeds, 1.50 of 3."
    )


def test_an_arm_that_failed_at_a_budget_is_named_where_ranks_leave_it_out() -> None:
    ranks = [
        {"arm": arm, "rank_mean": mean, "rank_low": 1.0, "rank_high": 2.0, "first_share": 0.5}
        for arm, mean in (("evo", 1.4), ("win", 1.6))
    ]
    rows = [row("evo", 0.4), row("win", 0.5, "windows")]
    both = [{"budget_text": text, "summary": rows, "pairs": []} for text in ("one", "other")]
    assert "not ranked" not in overall(both, ranks)
    both[0]["summary"] = [*rows, row("add", 0.3, "additive")]
    assert overall(both, ranks).endswith("add is not ranked: with results at some budgets only.")


def test_three_names_are_listed_with_commas() -> None:
    rows = [row("a", 0.1), row("b", 0.2), row("c", 0.3), row("d", 0.4)]
    text = verdict(rows, [pair("a", "b", None), pair("c", "a", None), pair("a", "d", None)])
    assert "No difference to b, c and d is shown." in text


def measured(a: str, b: str, middle: float, low: float, high: float) -> dict[str, Any]:
    better = a if high < 0 else b if low > 0 else None
    return {**pair(a, b, better), "difference": middle, "low": low, "high": high}


class TestWhetherSearchPaid:
    def said(self, evo: float, found: dict[str, Any]) -> str:
        rows = [row("evo", evo), row("win", 0.5, "windows")]
        kind = outcome(rows, [found]).kind
        return f"{kind}: {verdict(rows, [found])}"

    def test_it_helps_by_so_much(self) -> None:
        text = self.said(0.4, measured("evo", "win", -0.1, -0.15, -0.06))
        assert text.startswith("pays: evo has the lowest")
        assert text.endswith(
            "Search helped: evo is 0.1000 nats [0.0600, 0.1500] or 20 % below win, the best method "
            "without a search."
        )

    def test_a_search_whose_answers_needed_none_did_not_help(self) -> None:
        found = measured("evo", "win", -0.1, -0.15, -0.06)
        answers = {"seeds": 2, "baselines": ["block influence of sites"] * 2}
        rows = [row("evo", 0.4) | answers, row("win", 0.5, "windows")]
        text = verdict(rows, [found])
        assert text.endswith(
            "evo is 0.1000 nats [0.0600, 0.1500] below win, but its every answer is a mask that "
            "needs no search (block influence of sites). Search did not help over one-pass methods "
            "here."
        )
        section = {"budget_text": "params 75 %", "summary": rows, "pairs": [found]}
        assert overall([section], []) == (
            "A method without a search is enough at params 75 % (block influence of sites: what "
            "evo came to)."
        )
        rows[0] |= {"seeds": 3}
        assert verdict(rows, [found]).endswith(
            "With 2 of 3 seeds its answer needed no search (block influence of sites)."
        )

    def test_a_simple_method_is_enough_where_no_gain_that_matters_is_possible(self) -> None:
        text = self.said(0.49, measured("evo", "win", -0.01, -0.02, 0.005))
        assert text.startswith("enough: ")
        assert "a gain of more than 0.0200 nats by evo is ruled out" in text
        assert text.endswith("Search did not help over one-pass methods here.")

    @pytest.mark.parametrize("evo", [0.45, 0.52])
    def test_an_interval_that_leaves_room_decides_nothing(self, evo: float) -> None:
        text = self.said(evo, measured("win", "evo", 0.5 - evo, -0.08, 0.12))
        assert text.startswith("open: ")
        assert "Whether search helps over win, a method without a search, is not decided" in text
        assert "leaves room for a gain of 0.1200 nats" in text
        assert "did not help" not in text

    def test_what_is_ruled_out_is_meant_of_all_pairs_that_it_was_picked_from(self) -> None:
        """The pair alone rules out more than 0.02 nats, all pairs together leave room for 0.03."""
        found = measured("evo", "win", -0.01, -0.02, 0.005)
        text = self.said(0.49, found | {"picked_low": -0.03, "picked_high": 0.015})
        assert text.startswith("open: ")
        assert "leaves room for a gain of 0.0300 nats" in text

    def test_a_slight_gain_that_is_shown_alone_is_not_called_no_help(self) -> None:
        found = measured("evo", "win", -0.01, -0.015, -0.005)
        text = self.said(0.49, found | {"verdict": "no difference shown", "picked_low": -0.02,
                                        "picked_high": 0.001})  # fmt: skip
        assert text.startswith("enough: ")
        assert "a gain of more than 0.0200 nats by evo is ruled out" in text
        assert text.endswith("What search gained over one-pass methods here is slight.")

    def test_a_search_that_lost(self) -> None:
        text = self.said(0.6, measured("evo", "win", 0.1, 0.05, 0.2))
        assert text.startswith("enough: win has the lowest")
        assert "win is enough here: evo is worse. Search did not help" in text

    def test_a_search_that_came_to_the_same_mask(self) -> None:
        text = self.said(0.5, measured("win", "evo", 0.0, 0.0, 0.0))
        assert text.startswith("enough: ")
        assert "win is enough here: evo came to the same. Search did not help" in text

    def test_it_takes_a_search_and_a_rival(self) -> None:
        rows = [row("evo", 0.4), row("greedy", 0.5, "greedy")]
        found = measured("evo", "greedy", -0.1, -0.2, -0.05)
        assert outcome(rows, [found]).kind == "no rival"
        assert "Search helped" not in verdict(rows, [found])

    def test_what_a_repair_gains_is_no_gain_of_the_search(self) -> None:
        """The window as cut is far behind, the window repaired as the search is, hardly."""
        evo = row("evo", 0.4) | {"finish": "sequential"}
        win = row("win", 0.8, "windows") | {"finish": "none"}
        found = measured("evo", "win", -0.4, -0.45, -0.36)
        assert outcome([evo, win], [found]).kind == "no rival"
        text = verdict([evo, win], [found])
        assert text.endswith(
            "Whether search helped is not said: no method without a search is repaired as evo is, "
            "and what a repair gains is no gain of the search."
        )
        alike = row("repaired", 0.5, "windows") | {"finish": "sequential"}
        pairs = [found, measured("evo", "repaired", -0.1, -0.15, -0.06)]
        assert verdict([evo, win, alike], pairs).endswith(
            "Search helped: evo is 0.1000 nats [0.0600, 0.1500] or 20 % below repaired, the best "
            "method without a search."
        )

    def test_budgets_are_grouped_by_what_pays_there(self) -> None:
        cases = {
            "params 87 %": measured("evo", "win", -0.1, -0.15, -0.06),
            "params 75 %": measured("evo", "win", -0.01, -0.02, 0.005),
            "cache 60 %": measured("evo", "win", -0.05, -0.2, 0.1),
            "cache 50 %": measured("evo", "win", -0.2, -0.3, -0.1),
        }
        sections = [
            {
                "budget_text": name,
                "summary": [row("evo", 0.5 + found["difference"]), row("win", 0.5, "windows")],
                "pairs": [found],
            }
            for name, found in cases.items()
        ]
        mended = [row("evo", 0.4) | {"finish": "gap"}, row("win", 0.5, "windows")]
        sections.append({"budget_text": "unlike", "summary": mended, "pairs": []})
        sections.append({"budget_text": "nothing", "summary": [], "pairs": []})
        ranks = [
            {"arm": arm, "rank_mean": mean, "rank_low": 1.0, "rank_high": 2.0,
             "first_share": best}
            for arm, mean, best in (("evo", 1.125, 0.95), ("win", 1.875, 0.05))
        ]  # fmt: skip
        assert overall(sections, ranks) == (
            "Search pays at params 87 % (evo, 0.1000 nats below win); cache 50 % (evo, 0.2000 nats "
            "below win). A method without a search is enough at params 75 % (win). The intervals "
            "can't tell whether search helps over a method without one at cache 60 % (win). No "
            "method without a search is repaired as the best search is at unlike. No search and "
            "one-pass method are there to compare at nothing. evo has "
            "the best mean rank over budgets and seeds, 1.12 [1.00, 2.00] of 2, and is first in "
            "95 % of resamples."
        )


class TestWarnings:
    def rows(self, select: float) -> list[dict[str, Any]]:
        return [
            row("evo", 0.45) | {"select_loss_mean": select, "gap_mean": 0.45 - select},
            row("win", 0.5, "windows") | {"select_loss_mean": 0.4, "gap_mean": 0.1},
        ]

    def test_a_lead_that_shrinks(self) -> None:
        """A lead of 0.2 on search data is at most 0.08 on held-out text; one of 0.06 may last."""
        found = [measured("evo", "win", -0.05, -0.08, -0.02)]
        (said,) = warnings_of([self.rows(0.2)], found, [], None)
        assert said == (
            "evo overfits its search text: its lead of 0.2000 nats on win there is 0.0500 on "
            "held-out text."
        )
        assert warnings_of([self.rows(0.34)], found, [], None) == []
        assert said in verdict(self.rows(0.2), found, [said])
        # Losses of other kinds, such as those of masks that are repaired later, are not compared.
        evo, win = self.rows(0.2)
        assert warnings_of([[evo], [win]], found, [], None) == []

    def test_a_search_that_went_on_too_long(self) -> None:
        turned = {"cost_tokens": 40_000.0, "difference": 0.03, "low": 0.01, "high": 0.05}
        courses = [{"arm": "a", "worsened": None}, {"arm": "evo", "worsened": turned}]
        (said,) = warnings_of([self.rows(0.4)], [], courses, None)
        assert said == (
            "What evo had found after 40,000 tokens was better on held-out text, by 0.0300 nats, "
            "than the mask with its lowest search loss: searching on made it worse."
        )

    def test_search_losses_that_do_not_carry_over(self) -> None:
        found = {"spearman": 0.21, "low": -0.2, "high": 0.6, "masks": 18}
        (said,) = warnings_of([self.rows(0.4)], [], [], found)
        assert "can't be told from the few that were measured" in said
        assert "rank correlation is 0.21 [-0.20, 0.60] over 18 masks" in said
        (said,) = warnings_of([self.rows(0.4)], [], [], found | {"high": 0.4})
        assert "says little about" in said
        assert said.endswith("Try a larger calibration.select_tokens.")
        assert warnings_of([self.rows(0.4)], [], [], found | {"low": 0.1}) == []
