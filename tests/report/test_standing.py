"""Pages of comparisons with courses, ranks and several budgets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tests.report.test_html import demand_self_contained

from depthsearch.report import compare_html
from depthsearch.report.standing import (
    budgets_picture,
    carry_table,
    course_picture,
    ranks_table,
)


@pytest.fixture
def whole(comparison: dict[str, Any]) -> dict[str, Any]:
    """The comparison with everything that newer ones hold."""
    names = [row["arm"] for row in comparison["summary"]]
    for row in comparison["summary"]:
        row |= {"method": "x", "select_loss_mean": row["heldout_kl_mean"] - 0.25}
        row |= {"gap_mean": 0.25, "gap_low": 0.2, "gap_high": 0.31}
    for arm in comparison["arms"]:
        arm["anytime_heldout"] = [
            {"cost_tokens": cost, "select_loss": loss, "heldout_kl": loss + 0.3, "mask": "x"}
            for cost, loss in arm["anytime"]
        ]
    comparison["anytime"] = [
        {
            "arm": name,
            "points": [
                {"cost_tokens": 2e5 * 3**n, "heldout_kl_mean": 2.0 / (n + 1 + place),
                 "heldout_kl_low": 1.9 / (n + 1 + place), "heldout_kl_high": 2.2 / (n + 1 + place)}
                for n in range(4)
            ],
            "worsened": None,
        }
        for place, name in enumerate(names)
    ]  # fmt: skip
    comparison["ranks"] = [
        {"arm": name, "rank_mean": 1.2 + place, "rank_low": 1.0, "rank_high": 2.9,
         "first_share": 0.875 if place == 0 else 0.0625}
        for place, name in enumerate(reversed(names))
    ]  # fmt: skip
    comparison |= {
        "correlation": {"spearman": 0.62, "low": 0.31, "high": 0.85, "masks": 21},
        "failed": [{"name": "<beam>", "seed": 2, "error": "out of <luck>"}],
        "budget_text": "params at most 75 %",
        "warnings": [],
    }
    return comparison


def several(whole: dict[str, Any]) -> dict[str, Any]:
    shared = ("version", "signature", "dense", "sites", "export")
    part = {key: value for key, value in whole.items() if key not in shared}
    other = copy.deepcopy(part) | {"budget_text": "kv_bytes at most 60 %"}
    nothing = {
        "budget_text": "bytes at most 20 %", "verdict": "No arm finished with every seed.",
        "failed": part["failed"], "arms": [], "summary": [], "pairs": [], "ranks": [],
        "anytime": [], "correlation": None, "cost_tokens": None,
    }  # fmt: skip
    return {key: whole[key] for key in shared} | {
        "cost_tokens": 2e6,
        "budgets": [part, other, nothing],
        "ranks": part["ranks"],
        "verdict": "Search pays at both.",
    }


def test_one_budget_shows_courses_ranks_and_what_carries_over(whole: dict[str, Any]) -> None:
    page = demand_self_contained(compare_html(whole))
    assert page.titles == [
        "Held-out quality",
        "Differences between arms",
        "Ranks",
        "The exported model beside the dense one",
        "What each arm drops",
        "What had been found earlier",
        "What each arm had found at each cost",
        "Does a lower search loss carry over?",
        "Every run",
        "Signature",
    ]
    assert len(page.images) == 5
    assert "<beam> failed with seed 2 and is left out: out of <luck>" in page.text
    assert "0.62 [0.31, 0.85], Spearman over 21 masks" in page.text


def test_several_budgets_share_a_page(whole: dict[str, Any]) -> None:
    page = demand_self_contained(compare_html(several(whole)))
    assert page.titles == [
        "All budgets",
        "Ranks",
        "The exported model beside the dense one",
        "params at most 75 %",
        "kv_bytes at most 60 %",
        "bytes at most 20 %",
        "Signature",
    ]
    assert len(page.images) == 1 + 2 * 5
    assert page.text.index("Search pays at both.") < page.text.index("All budgets")
    assert page.text.count("Does a lower search loss carry over?") == 2
    assert page.text.count("No arm finished with every seed.") == 1
    assert "3 budgets" in page.text


def test_tables_hold_the_figures(whole: dict[str, Any]) -> None:
    assert ranks_table(whole).rows[0] == ("evolution", "1.20", "1.00 to 2.90", "88 %")
    rows = {row[0]: row[1:] for row in carry_table(whole).rows}
    greedy = whole["summary"][0]["heldout_kl_mean"]
    assert rows["greedy"] == (
        f"{greedy - 0.25:.4f}", f"{greedy:.4f}", "+0.2500", "+0.2000 to +0.3100",
    )  # fmt: skip
    whole["summary"][0]["gap_mean"] = None
    assert "greedy" not in {row[0] for row in carry_table(whole).rows}


def test_pictures_say_in_words_what_they_show(whole: dict[str, Any]) -> None:
    drawn = course_picture(whole)
    assert drawn is not None
    assert "greedy ends at 0.5000" in drawn.alt
    parts = several(whole)["budgets"]
    shown = budgets_picture(parts)
    assert shown is not None
    assert shown.alt == "Held-out KL of greedy, best window, evolution at 2 budgets."
    assert budgets_picture(parts[1:]) is None
    assert course_picture(parts[2]) is None
