from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from landscapes import Landscape, best_final, drive, proposals, toy, unreliable

from depthsearch.searchers import build_searcher
from depthsearch.searchers.front import promising
from depthsearch.searchers.moves import Moves
from depthsearch.space import (
    Batch,
    Budget,
    Evaluation,
    Mask,
    Proposal,
    SearchSpace,
    Status,
)

OWN = Budget("params", ratio=0.75, of="blocks")
FURTHER = (
    Budget("params", ratio=0.9, of="blocks"),
    Budget("params", ratio=0.6, of="blocks"),
)
TWO_METRICS = (Budget("params", ratio=0.6, of="blocks"), Budget("kv_bytes", ratio=0.6))
GRID = tuple(
    replace(first, also=Budget("kv_bytes", ratio=ratio))
    for first in (OWN, FURTHER[0])
    for ratio in (0.7, 0.5)
)

Record = list[tuple[Batch, list[Evaluation]]]


def fronted(
    blocks: int = 6, further: Sequence[Budget] = FURTHER, packable: bool = False
) -> SearchSpace:
    return replace(toy(blocks, OWN, packable=packable), front=tuple(further))


def searched(
    space: SearchSpace, landscape: Landscape, limit: int, method: str = "front", seed: int = 0
) -> Record:
    searcher = build_searcher(method, space, landscape.hints(), np.random.default_rng(seed), {})
    return drive(searcher, lambda p: landscape.evaluate(p.mask), limit=limit)


def lowest(record: Record, point: SearchSpace) -> float:
    """The lowest loss of a mask within the cap of `point`."""
    return min(
        e.loss
        for _, evaluations in record
        for e in evaluations
        if e.loss is not None and point.contains(e.mask) and point.fits(e.mask)
    )


@pytest.mark.parametrize(
    "further", [FURTHER, TWO_METRICS, GRID], ids=["one metric", "two metrics", "pairs"]
)
@pytest.mark.parametrize("packable", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_one_search_finds_the_optimum_of_every_budget(
    further: tuple[Budget, ...], packable: bool, seed: int
) -> None:
    space = fronted(7 if packable else 6, further, packable)
    landscape = Landscape(len(space.sites), seed)
    record = searched(space, landscape, limit=240)
    for point in space.points:
        masks = point.enumerate()
        assert masks is not None
        optimum = min(float(np.mean(landscape.losses(mask))) for mask in masks)
        assert lowest(record, point) <= optimum + 1e-12, point.budget


def test_one_search_keeps_up_with_one_for_each_budget_at_equal_evaluations() -> None:
    total = 240
    ratios = []
    for seed in range(4):
        space = fronted(16)
        landscape = Landscape(32, seed, scatter=0.5)
        record = searched(space, landscape, total)
        for point in space.points:
            alone = best_final(searched(point, landscape, total // len(space.points), "evolution"))
            assert alone.loss is not None
            ratios.append(lowest(record, point) / alone.loss)
    assert max(ratios) <= 1.05
    assert float(np.mean(ratios)) < 1.0


def test_a_mask_is_asked_for_once_and_final_where_it_meets_a_budget() -> None:
    space = fronted(6, TWO_METRICS)
    asked = proposals(searched(space, Landscape(12), limit=300))
    assert len({proposal.mask for proposal in asked}) == len(asked)
    for proposal in asked:
        assert proposal.final == any(point.on_budget(proposal.mask) for point in space.points)
    assert [p.origin for p in asked].count("dense") == 1
    swept = {p.mask for p in asked if p.origin == "sweep" or p.origin == "dense"}
    # Masks that are a baseline as well were asked for as such.
    assert swept <= {space.dense, *space.removals(space.dense)}


# At the loosest one FFN is enough, or three attentions.
LOOSE = (*FURTHER, Budget("params", cap=10 + 32 - 3))


@pytest.mark.parametrize("further", [FURTHER, LOOSE], ids=["far", "one removal away"])
def test_masks_race_only_against_masks_of_their_budget(further: tuple[Budget, ...]) -> None:
    space = fronted(8, further)
    landscape = Landscape(16)
    record = searched(space, landscape, limit=300)
    checked = 0
    for batch, _ in record:
        if batch.proposals[0].origin == "dense":
            assert not any(
                space.meets(m) for m in (*(p.mask for p in batch.proposals), *batch.rivals)
            )
            continue
        masks = [*(p.mask for p in batch.proposals), *batch.rivals]
        assert any(all(point.on_budget(m) for m in masks) for point in space.points)
        checked += bool(batch.rivals)
    assert checked > 10


def test_masks_migrate_between_the_budgets() -> None:
    space = fronted(12)
    asked = proposals(searched(space, Landscape(24, scatter=1.0), limit=400))
    migrants = [p.mask for p in asked if p.origin == "front migrant"]
    assert migrants
    for point in space.points:
        assert any(point.on_budget(mask) for mask in migrants), point.budget
    alone = proposals(searched(toy(6, OWN), Landscape(12), limit=60))
    assert not any(p.origin == "front migrant" for p in alone)


@pytest.mark.parametrize("packable", [False, True])
def test_a_migrant_keeps_what_the_other_budget_had_found(packable: bool) -> None:
    space = fronted(10, packable=packable)
    rng = np.random.default_rng(0)
    for source in space.points:
        mask = source.decode(rng.random(20).tolist())
        for target in space.points:
            moves = Moves(target, np.random.default_rng(1))
            for _ in range(10):
                migrant = moves.migrate(mask)
                assert target.on_budget(migrant)
                if not packable and target.cap > source.cap:
                    assert set(migrant.dropped) <= set(mask.dropped)
                if target == source:
                    assert migrant == mask


def test_windows_near_the_best_ones_come_first() -> None:
    space = toy(10, OWN)
    near, far = Mask.dropping(20, range(4, 9)), Mask.dropping(20, range(12, 17))
    known = {
        near: Evaluation(near, (0.1,), 1),
        far: Evaluation(far, (0.9,), 1),
    }
    windows = [
        Proposal(Mask.dropping(20, range(start, start + 6)), f"window {start}")
        for start in range(space.dense.key.count("1") - 6)
    ]
    ordered = [p.mask.dropped[0] for p in promising(windows, known)]
    # The centres known are 6 and 14: what lies nearer to 6 starts below 7.5.
    assert sorted(ordered[:8]) == list(range(8))
    assert ordered[0] in (3, 4)
    assert promising(windows, {}) == windows


def test_windows_that_lost_are_compared_on_the_text_they_share() -> None:
    near, far = Mask.dropping(20, range(4, 9)), Mask.dropping(20, range(12, 17))
    known = {
        near: Evaluation(near, (0.3,), 1, Status.ELIMINATED),
        far: Evaluation(far, (0.2, 0.9), 2, Status.ELIMINATED),
    }
    windows = [Proposal(mask, "window") for mask in known]
    assert [p.mask for p in promising(windows, known)] == [far, near]


@pytest.mark.parametrize("n", [1, 5])
def test_the_size_of_asks_and_failures_leave_its_promises(n: int) -> None:
    space = fronted(6, TWO_METRICS)
    landscape = Landscape(12)
    searcher = build_searcher("front", space, landscape.hints(), np.random.default_rng(0), {})
    record = drive(searcher, unreliable(landscape, 0.3), n=n, limit=200)
    asked = proposals(record)
    assert len({p.mask for p in asked}) == len(asked)
    assert all(len(batch.proposals) <= n for batch, _ in record)
    known = {e.mask: e for _, evaluations in record for e in evaluations}
    assert all(known[mask].status is Status.OK for batch, _ in record for mask in batch.rivals)


@pytest.mark.parametrize("further", [FURTHER, GRID], ids=["one metric", "pairs"])
def test_it_ends_when_every_budget_is_exhausted(further: tuple[Budget, ...]) -> None:
    space = fronted(4, further)
    record = searched(space, Landscape(8), limit=5000)
    masks = {mask for point in space.points for mask in point.enumerate() or ()}
    assert {p.mask for p in proposals(record) if p.final} == masks


def test_the_same_tells_give_the_same_asks_and_another_seed_others() -> None:
    space, landscape = fronted(10), Landscape(20)
    first, again, other = (
        [p.mask for p in proposals(searched(space, landscape, 200, seed=seed))]
        for seed in (0, 0, 1)
    )
    assert first == again != other
