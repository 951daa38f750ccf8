"""Surrogate-assisted evolution: what it measures, how it chooses, and what that brings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from landscapes import Landscape, best_final, drive, proposals, toy

from depthsearch.searchers import build_searcher
from depthsearch.searchers.surrogate import choose, lower_confidence_bounds
from depthsearch.space import Evaluation, Mask, Proposal, SearchSpace

LIMIT = 152


def run(
    method: str,
    space: SearchSpace,
    landscape: Landscape,
    seed: int,
    limit: int = LIMIT,
    **options: object,
) -> tuple[list[Proposal], float]:
    searcher = build_searcher(
        method, space, landscape.hints(), np.random.default_rng(seed), options
    )
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=limit)
    return proposals(record), best_final(record).loss or math.inf


def test_lower_confidence_bounds_by_hand() -> None:
    bounds = lower_confidence_bounds(np.array([1.0, 2.0, 0.5]), np.array([0.25, 4.0, -1e-12]), 1.5)
    assert bounds.tolist() == [0.25, -1.0, 0.5]


def test_a_batch_is_chosen_by_hand() -> None:
    """Two that tell the same and one that tells something else, hardly worse: 0, 2, 1."""
    means = np.array([0.0, 0.01, 0.05])
    covariance = np.array([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert choose(means, covariance, "abc", 3, 1.0, 0.0) == [0, 2, 1]
    # By the means alone nothing tells them apart but their worth; equal ones go by key.
    assert choose(means, covariance, "abc", 2, 0.0, 0.0) == [0, 1]
    assert choose(np.zeros(3), np.eye(3), "cab", 2, 1.0, 0.1) == [1, 2]
    assert choose(means, covariance, "abc", 9, 1.0, 0.1) == [0, 2, 1]


def test_choosing_one_by_one_is_conditioning_on_all_before() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(12, 12))
    covariance, means, noise = root @ root.T / 12, rng.normal(0.0, 0.2, 12), 0.05
    chosen: list[int] = []
    for _ in range(5):
        known = covariance[np.ix_(chosen, chosen)] + noise * np.eye(len(chosen))
        left = covariance - covariance[:, chosen] @ np.linalg.solve(known, covariance[chosen])
        bounds = means - np.sqrt(np.diag(left))
        chosen.append(min(set(range(12)).difference(chosen), key=lambda i: float(bounds[i])))
    assert choose(means, covariance, [str(i) for i in range(12)], 5, 1.0, noise) == chosen


def test_starts_as_evolution_does_and_screens_three_quarters() -> None:
    space, landscape = toy(30), Landscape(60)
    asked, _ = run("surrogate", space, landscape, 0, 150, candidates=200)
    plain, _ = run("evolution", space, landscape, 0, 150)
    first = next(i for i, p in enumerate(plain) if p.origin.startswith("evolution"))
    assert asked[:first] == plain[:first]
    generation = [p.origin for p in asked[first : first + 16]]
    assert sum(origin.startswith("surrogate ") for origin in generation) == 12
    assert sum(origin.startswith("evolution ") for origin in generation) == 4


@pytest.mark.parametrize("offspring", [1, 3, 6])
def test_a_quarter_is_not_screened_however_small_the_generation(offspring: int) -> None:
    space, landscape = toy(12), Landscape(24)
    options: dict[str, object] = {"candidates": 40, "offspring": offspring}
    start = next(
        i
        for i, p in enumerate(run("surrogate", space, landscape, 0, 120, **options)[0])
        if p.origin.startswith(("surrogate", "evolution"))
    )
    asked, _ = run("surrogate", space, landscape, 0, start + 24, **options)
    screened = [p.origin.startswith("surrogate ") for p in asked[start : start + 24]]
    assert (sum(screened), len(screened)) == (18, 24)


def test_each_answer_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a mask is on budget is asked a few times a mask, not once a generation."""
    asked: Counter[Mask] = Counter()
    on_budget = SearchSpace.on_budget

    def counted(space: SearchSpace, mask: Mask) -> bool:
        asked[mask] += 1
        return on_budget(space, mask)

    monkeypatch.setattr(SearchSpace, "on_budget", counted)
    run("surrogate", toy(12), Landscape(24), 0, 120, candidates=40, offspring=4)
    assert max(asked[mask] for mask in toy(12).removals(toy(12).dense)) <= 4


def test_beats_plain_evolution_at_equal_evaluations() -> None:
    """On these four landscapes, soon after the start that both share; on others it often ties.

    The landscape charges a gap by its root sum of squares, which the regression has as a figure.
    """
    space = toy(30)
    gains = []
    for seed in range(4):
        landscape = Landscape(60, seed)
        _, plain = run("evolution", space, landscape, seed)
        _, screened = run("surrogate", space, landscape, seed, candidates=500)
        gains.append(plain - screened)
    assert min(gains) >= 0.0
    assert sum(gain > 0.01 for gain in gains) >= 3


def test_rounding_errors_change_no_ask() -> None:
    space, landscape = toy(15), Landscape(30)

    def asks(shake: float) -> list[Proposal]:
        rng = np.random.default_rng(5)

        def answer(proposal: Proposal) -> Evaluation:
            exact = landscape.evaluate(proposal.mask)
            losses = tuple(x * (1 + shake * float(rng.normal())) for x in exact.losses)
            return replace(exact, losses=losses)

        options: Mapping[str, object] = {"candidates": 100}
        searcher = build_searcher(
            "surrogate", space, landscape.hints(), np.random.default_rng(0), options
        )
        return proposals(drive(searcher, answer, limit=110))

    assert asks(0.0) == asks(1e-13)
