from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from tests.searchers.landscapes import Landscape, toy

from depthsearch.errors import BudgetError
from depthsearch.space import (
    Budget,
    CostTable,
    Evaluation,
    Mask,
    SearchSpace,
    SiteCosts,
    Status,
    budget_grid,
    front_limits,
    front_metrics,
    front_of,
    hypervolume,
    nondominated,
)

LOOSE = Budget("params", ratio=0.9, of="blocks")
OWN = Budget("params", ratio=0.75, of="blocks")
TIGHT = Budget("params", ratio=0.6, of="blocks")
CACHE = Budget("kv_bytes", ratio=0.5)


def several(*budgets: Budget, blocks: int = 4) -> SearchSpace:
    return replace(toy(blocks, OWN), front=budgets)


def test_points_are_the_space_at_each_budget_the_loosest_first() -> None:
    space = several(TIGHT, CACHE, LOOSE)
    assert [point.budget for point in space.points] == [LOOSE, OWN, TIGHT, CACHE]
    for point in space.points:
        assert point == toy(4, point.budget)
    assert toy(4, OWN).points == (toy(4, OWN),)
    assert front_metrics(space) == ("params", "kv_bytes")


def test_a_mask_meets_any_of_the_budgets() -> None:
    space = several(TIGHT, CACHE)
    alone = [set(toy(4, budget).enumerate() or ()) for budget in (OWN, TIGHT, CACHE)]
    masks = [Mask(keep) for keep in itertools.product((True, False), repeat=8)]
    assert {mask for mask in masks if space.meets(mask)} == set.union(*alone)
    assert {mask for mask in masks if space.on_budget(mask)} == alone[0]


def test_a_space_with_a_front_survives_json_and_one_without_stays_as_it_was() -> None:
    space = several(TIGHT, CACHE)
    assert SearchSpace.from_json(json.loads(json.dumps(space.to_json()))) == space
    assert "front" not in toy(4, OWN).to_json()
    assert space.fingerprint != toy(4, OWN).fingerprint


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget("params", cap=toy(4, OWN).cap), "allow the same cost"),
        (OWN, "allow the same cost"),
        (Budget("params", cap=3), "cannot be met"),
        (Budget("sites", drop=100), "100 sites dropped, but of the model's 8 at most 8 may be"),
        (Budget("blocks", drop=1), "granularity: block"),
    ],
)
def test_budgets_that_can_not_stand_together_are_refused(budget: Budget, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        several(budget)


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_left_is_what_no_other_row_beats(columns: int, seed: int) -> None:
    rows = np.random.default_rng(seed).integers(0, 5, (40, columns)).tolist()

    def beaten(row: list[int]) -> bool:
        return any(
            other != row and all(a <= b for a, b in zip(other, row, strict=True)) for other in rows
        )

    kept = nondominated(rows)
    assert sorted({tuple(rows[i]) for i in kept}) == sorted(
        {tuple(row) for row in rows if not beaten(row)}
    )
    assert len({tuple(rows[i]) for i in kept}) == len(kept)
    assert all(rows.index(rows[i]) == i for i in kept)


def test_the_front_of_evaluations_weighs_loss_and_both_costs() -> None:
    space = several(CACHE)
    landscape = Landscape(8)
    masks = [Mask(keep) for keep in itertools.product((True, False), repeat=8)]
    known = [landscape.evaluate(mask) for mask in masks]
    failed = Evaluation(masks[-1], (), 0, Status.FAILED)
    front = front_of(space, [*known[:-1], failed])
    costs = space.costs

    def beats(a: Evaluation, b: Evaluation) -> bool:
        pairs = [
            (a.loss or 0.0, b.loss or 0.0),
            (costs.cost("params", a.mask), costs.cost("params", b.mask)),
            (costs.cost("kv_bytes", a.mask), costs.cost("kv_bytes", b.mask)),
        ]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    expected = {e.mask for e in known[:-1] if not any(beats(o, e) for o in known[:-1])}
    assert {e.mask for e in front} == expected
    assert 1 < len(front) < len(known)


def pair(params: Budget, cache: float) -> Budget:
    return replace(params, also=Budget("kv_bytes", ratio=cache))


def test_the_points_of_two_costs_are_loosest_first_in_both() -> None:
    budgets = [pair(OWN, 0.5), pair(LOOSE, 0.5), pair(OWN, 0.75), LOOSE, pair(LOOSE, 0.75)]
    space = several(*budgets)
    assert [point.budget for point in space.points] == [
        LOOSE,
        pair(LOOSE, 0.75),
        pair(LOOSE, 0.5),
        OWN,
        pair(OWN, 0.75),
        pair(OWN, 0.5),
    ]
    assert front_metrics(space) == ("params", "kv_bytes")
    for mask in map(Mask, itertools.product((True, False), repeat=8)):
        costs = {metric: limit.cost(mask) for metric, limit in front_limits(space).items()}
        assert costs == {m: space.costs.cost(m, mask) for m in ("params", "kv_bytes")}
        for point in space.points:
            assert point.fits(mask) == all(
                space.costs.cost(part.metric, mask) <= replace(toy(4, part)).cap
                for part in point.budget.parts
            )


def test_pairs_of_the_same_two_caps_are_refused() -> None:
    with pytest.raises(BudgetError, match="allow the same cost"):
        several(pair(OWN, 0.5), pair(OWN, 0.51))


def test_a_grid_is_every_pair_and_names_what_can_not_be_met() -> None:
    # The first attention stays: a cache of 2 of 8 is the least there is.
    space = replace(toy(4, OWN), protected=frozenset({0}))
    second = [Budget("kv_bytes", ratio=ratio) for ratio in (0.75, 0.25, 0.2)]
    grid = budget_grid(space, [LOOSE], second)
    assert grid.budgets == tuple(pair(first, c) for c in (0.75, 0.25) for first in (OWN, LOOSE))
    assert set(grid.left_out) == {pair(OWN, 0.2), pair(LOOSE, 0.2)}
    for reason in grid.left_out.values():
        assert "kv_bytes at most 20 % of the dense model allows 1, but" in reason
    assert len(replace(space, front=grid.budgets).points) == 5
    with pytest.raises(BudgetError, match="no pair of budgets of the front can be met: the budget"):
        budget_grid(space, [LOOSE], second[2:])


def test_a_second_budget_that_the_dense_model_meets_leaves_the_first_alone() -> None:
    grid = budget_grid(toy(4, OWN), [LOOSE], [Budget("kv_bytes", ratio=1.0)])
    assert grid.budgets == (LOOSE,)


def test_only_masks_that_meet_both_caps_can_make_a_pair_impossible() -> None:
    """In a packable space each cap can be met alone, and both not together."""
    table = CostTable(
        {
            "params": SiteCosts(0, (9, 0, 1, 0)),
            "kv_bytes": SiteCosts(0, (1, 0, 9, 0)),
        }
    )
    # The last FFN stays, and so one of the attentions: a light one is dear in the other cost.
    own = Budget("params", cap=1)
    space = SearchSpace(toy(2).sites, table, own, "sublayer", frozenset({3}), True)
    grid = budget_grid(space, [Budget("params", cap=9)], [Budget("kv_bytes", cap=1)])
    assert [budget.text for budget in grid.budgets] == ["params at most 9 and kv_bytes at most 1"]
    assert [budget.text for budget in grid.left_out] == ["params at most 1 and kv_bytes at most 1"]


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_hypervolume_counts_the_cells_that_a_row_dominates(columns: int, seed: int) -> None:
    rows = np.random.default_rng(seed).integers(0, 7, (8, columns)).tolist()
    reference = (5, 6, 4, 5)[:columns]
    cells = itertools.product(*(range(top) for top in reference))
    dominated = sum(
        any(all(a <= c for a, c in zip(row, cell, strict=True)) for row in rows) for cell in cells
    )
    assert hypervolume(rows, reference) == dominated
    kept = [rows[place] for place in nondominated(rows)]
    assert hypervolume(kept, reference) == dominated
    assert hypervolume([], reference) == 0
