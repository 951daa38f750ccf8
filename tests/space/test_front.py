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
    Evaluation,
    Mask,
    SearchSpace,
    Status,
    front_metrics,
    front_of,
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
