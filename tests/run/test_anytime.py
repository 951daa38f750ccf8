"""What a search had found at each cost, on hand-made journals and losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from depthsearch.run.anytime import Improvement, Step, course, improvements, spaced


def asked(number: int, cost: float, *found: tuple[str, float | None, str, bool]) -> list[Any]:
    """An ask with its tell; each mask with loss, status and whether it is on budget."""
    proposals = [{"mask": m, "origin": f"from {m}", "final": final} for m, _, _, final in found]
    told = [{"mask": m, "loss": loss, "status": status} for m, loss, status, _ in found]
    return [
        {"op": "ask", "id": number, "proposals": proposals},
        {"op": "tell", "id": number, "evaluations": told, "cost_tokens": cost},
    ]


def test_only_complete_masks_on_budget_improve() -> None:
    journal = [
        {"op": "start"},
        {"op": "hints", "cost_tokens": 5.0},
        *asked(0, 10.0, ("a", 0.1, "ok", False), ("b", 0.2, "eliminated", True)),
        *asked(1, 20.0, ("c", 3.0, "ok", True), ("d", 2.0, "ok", True)),
        *asked(2, 30.0, ("e", 2.0, "ok", True), ("f", None, "non_finite", True)),
        *asked(3, 40.0, ("h", 1.0, "ok", True), ("g", 1.0, "ok", True)),
        {"op": "finals", "cost_tokens": 50.0},
    ]
    assert improvements(journal) == [
        Improvement(20.0, 2.0, "d", "from d"),
        Improvement(40.0, 1.0, "g", "from g"),
    ]


def test_points_are_spaced_in_the_logarithm_of_cost() -> None:
    found = [Improvement(float(cost), 1 / cost, str(cost), "") for cost in (1, 2, 3, 50, 99, 100)]
    # Best at cost 1, 10 and 100.
    assert [f.mask for f in spaced(found, 3)] == ["1", "3", "100"]
    assert [f.mask for f in spaced(found, 2)] == ["1", "100"]
    assert [f.mask for f in spaced(found, 1)] == ["100"]
    assert spaced(found, 0) == []
    assert spaced(found, 6) == found
    for most in range(2, 6):
        assert len(spaced(found, most)) <= most


def test_a_course_holds_each_seed_at_what_it_had() -> None:
    """Seed one has masks from cost 10 and 30 on, seed two from 20 on: they start together at 20."""
    runs = [
        [Step(10.0, [4.0, 6.0]), Step(30.0, [1.0, 3.0])],
        [Step(20.0, [8.0, 8.0])],
    ]
    found = course(runs, np.random.default_rng(0))
    assert [point["cost_tokens"] for point in found["points"]] == [20.0, 30.0]
    assert [point["heldout_kl_mean"] for point in found["points"]] == [6.5, 5.0]
    for point in found["points"]:
        assert point["heldout_kl_low"] < point["heldout_kl_mean"] < point["heldout_kl_high"]
    assert found["worsened"] is None


def test_a_search_that_went_on_too_long_is_told_from_noise() -> None:
    rng = np.random.default_rng(1)
    base = 2 + rng.normal(size=40)
    lost = base + 0.3 + 0.1 * rng.normal(size=40)
    worse = [Step(1.0, base + 1), Step(5.0, base), Step(9.0, lost), Step(9.5, lost)]
    found = course([worse], np.random.default_rng(0))["worsened"]
    assert found["cost_tokens"] == 5.0
    assert found["difference"] == pytest.approx(np.mean(lost - base))
    assert 0 < found["low"] < found["difference"] < found["high"]
    noise = base + 0.02 + 0.3 * rng.normal(size=40)
    assert course([[Step(1.0, base), Step(9.0, noise), Step(9.5, noise)]], rng)["worsened"] is None


def test_an_answer_that_the_finals_chose_is_no_search_that_went_on_too_long() -> None:
    base = 2 + np.random.default_rng(1).normal(size=40)
    runs = [[Step(1.0, base), Step(9.0, base - 0.1), Step(9.5, base + 0.3)]]
    found = course(runs, np.random.default_rng(0))
    assert found["worsened"] is None
    assert found["points"][-1]["heldout_kl_mean"] == pytest.approx(np.mean(base) + 0.3)


def test_falls_that_noise_explains_are_rarely_reported() -> None:
    """Six masks of one worth: at 95 % shared by all, few of the searches look as if they turned."""
    rng, said, runs = np.random.default_rng(2), 0, 120
    for _ in range(runs):
        shared = rng.normal(size=50)
        steps = [Step(float(2**n), shared + 0.2 * rng.normal(size=50)) for n in range(7)]
        said += course([[*steps, steps[-1]]], rng)["worsened"] is not None
    assert said / runs <= 0.1
