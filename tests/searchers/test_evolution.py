"""Evolution: seeds, races, parents, and better than what it starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from landscapes import SPACES, Landscape, best_final, drive, proposals, toy, unreliable

from depthsearch.searchers import build_searcher, cheap_baselines, is_baseline
from depthsearch.searchers.evolution import Credit
from depthsearch.space import Budget, Evaluation, Hints, Mask, SearchSpace, Stage, Status


def evolve(
    space: SearchSpace,
    landscape: Landscape,
    limit: int,
    options: Mapping[str, object] | None = None,
) -> tuple[list[tuple[object, list[Evaluation]]], Evaluation]:
    searcher = build_searcher(
        "evolution", space, landscape.hints(), np.random.default_rng(0), options or {}
    )
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=limit)
    return list(record), best_final(record)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scatter", [0.0, 0.6])
def test_better_than_every_baseline_on_a_large_space(seed: int, scatter: float) -> None:
    space, landscape = toy(30), Landscape(60, seed, scatter)
    _, best = evolve(space, landscape, 300)
    losses = [
        landscape.evaluate(proposal.mask).loss
        for proposal in cheap_baselines(space, landscape.hints())
    ]
    assert best.loss is not None
    assert best.loss < min(loss for loss in losses if loss is not None) - 0.02


@pytest.mark.parametrize("limit", [1, 5, 30, 60])
def test_never_worse_than_the_best_baseline_it_had_time_for(limit: int) -> None:
    space, landscape = SPACES["packable"], Landscape(14)
    baselines = cheap_baselines(space, landscape.hints())
    searcher = build_searcher("evolution", space, landscape.hints(), np.random.default_rng(0), {})
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), n=1, limit=limit)
    asked = {proposal.mask for proposal in proposals(record)}
    losses = [landscape.evaluate(p.mask).loss for p in baselines if p.mask in asked]
    best = best_final(record).loss
    assert best is not None
    assert best <= min(loss for loss in losses if loss is not None)


def test_beats_greedy_and_random_at_the_cost_of_greedy() -> None:
    space = toy(30, Budget("params", ratio=0.85, of="blocks"))
    landscape = Landscape(60, 0)
    found: dict[str, float] = {}
    for method in ("greedy", "random"):
        searcher = build_searcher(method, space, landscape.hints(), np.random.default_rng(0), {})
        record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=500)
        found[method] = best_final(record).loss or 0.0
    _, best = evolve(space, landscape, 500)
    assert best.loss is not None
    assert best.loss < found["greedy"] < found["random"]


def test_starts_from_the_baselines_then_sweeps_then_completes() -> None:
    space, landscape = toy(30), Landscape(60)
    searcher = build_searcher("evolution", space, landscape.hints(), np.random.default_rng(0), {})
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=140)
    batches = [batch for batch, _ in record]
    assert [p.mask for p in batches[0].proposals] == [
        p.mask for p in cheap_baselines(space, landscape.hints())
    ]
    assert batches[0].survivors == 4
    assert batches[0].stages == (Stage(0.25, math.ceil(len(batches[0].proposals) / 4)),)
    assert batches[0].rivals == ()
    assert [p.mask for p in batches[1].proposals] == [space.dense, *space.removals(space.dense)]
    assert batches[1].survivors == 61 // 4
    assert batches[1].stages == (Stage(0.25, 61 // 4),)
    assert batches[1].rivals == ()
    origins = {p.origin for p in batches[2].proposals}
    assert any(is_baseline(origin) for origin in origins)
    assert any(origin.startswith("completed prefix") for origin in origins)
    assert all(p.origin.startswith("evolution ") for b in batches[3:] for p in b.proposals)


def test_rivals_are_the_best_complete_masks_and_never_eliminated() -> None:
    space, landscape = SPACES["sublayer"], Landscape(12)
    answer = unreliable(landscape, 0.5)
    searcher = build_searcher("evolution", space, landscape.hints(), np.random.default_rng(0), {})
    complete: dict[Mask, float] = {}
    for batch, evaluations in drive(searcher, answer, limit=140):
        if batch.survivors is not None and all(p.final for p in batch.proposals):
            ranked = sorted(complete, key=lambda mask: (complete[mask], mask.key))
            assert batch.rivals == tuple(ranked[:4])
        for proposal, evaluation in zip(batch.proposals, evaluations, strict=True):
            if evaluation.status is Status.OK and proposal.final:
                assert evaluation.loss is not None
                complete[evaluation.mask] = evaluation.loss


@pytest.mark.parametrize("method", ["evolution", "surrogate"])
def test_a_start_share_of_one_judges_every_baseline_on_the_whole_text(method: str) -> None:
    space, landscape = toy(30), Landscape(60)
    options: dict[str, object] = {"start_share": 1.0}
    searcher = build_searcher(method, space, landscape.hints(), np.random.default_rng(0), options)
    (first, _), (sweep, _) = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=100)[:2]
    assert first.stages == ()
    assert sweep.stages == (Stage(1.0, 15),)


@pytest.mark.parametrize("method", ["evolution", "surrogate"])
def test_the_better_half_of_a_screened_generation_goes_on(method: str) -> None:
    space, landscape = toy(30), Landscape(60)
    options: dict[str, object] = {"screen": 0.5, "offspring": 12}
    searcher = build_searcher(method, space, landscape.hints(), np.random.default_rng(0), options)
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=140)
    generations = [batch for batch, _ in record[3:]]
    assert generations
    for batch in generations:
        assert len(batch.proposals) == 12
        assert batch.stages == (Stage(0.5, 6),)


@pytest.mark.parametrize("offspring", [1, 3, 4])
def test_half_of_the_offspring_are_exchanges_however_small_the_generation(offspring: int) -> None:
    space, landscape = toy(30), Landscape(60)
    options: dict[str, object] = {"offspring": offspring, "sweep": False}
    searcher = build_searcher(
        "evolution", space, landscape.hints(), np.random.default_rng(0), options
    )
    start = len(searcher.ask().proposals)
    searcher = build_searcher(
        "evolution", space, landscape.hints(), np.random.default_rng(0), options
    )
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=start + 24)
    origins = [p.origin for p in proposals(record)[start : start + 24]]
    assert origins.count("evolution exchange") == 12


def test_sweep_can_be_left_out() -> None:
    record, _ = evolve(SPACES["sublayer"], Landscape(12), 60, {"sweep": False})
    assert all(p.final for batch, _ in record for p in batch.proposals)  # type: ignore[attr-defined]


def test_finds_a_window_far_from_where_influence_points() -> None:
    """One good gap, no gradient towards it from single removals, and misleading hints."""
    space = toy(20, Budget("sites", drop=8), packable=True)
    target = set(range(11, 19))

    def loss(mask: Mask) -> float:
        return 0.0 if set(mask.dropped) == target else 1.0 + 0.01 * len(target & set(mask.kept))

    rows = tuple(tuple(0.9 - 0.01 * abs(i - j) for j in range(41)) for i in range(41))
    searcher = build_searcher("evolution", space, Hints(rows, rows), np.random.default_rng(0), {})
    record = drive(searcher, lambda p: Evaluation(p.mask, (loss(p.mask),) * 2, 2), limit=60)
    assert best_final(record).loss == 0.0


def test_moves_that_succeed_are_drawn_more_often_and_none_dies_out() -> None:
    credit = Credit(("swap", "slide", "merge"))
    assert credit.weights == pytest.approx([1 / 3] * 3)
    masks = [Mask.dropping(20, [i]) for i in range(20)]
    for _ in range(20):
        credit.update(dict(zip(masks, ["swap", "slide"] * 10, strict=True)), masks[1::2])
    swap, slide, merge = credit.weights
    assert slide > merge > swap >= 0.1
    assert sum(credit.weights) == pytest.approx(1.0)
