"""Gaps measured alone and added up."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from landscapes import SPACES, Landscape, drive, proposals, toy, two_stacks

from depthsearch.searchers import build_searcher
from depthsearch.searchers.gaps import GAPS, Gap, added_up, cheapest, gap_plan
from depthsearch.space import Evaluation, Mask, SearchSpace


def gaps_of(rows: list[tuple[int, int, int, float]]) -> list[Gap]:
    return [Gap(start, start + length, freed, loss) for start, length, freed, loss in rows]


def apart(chosen: tuple[Gap, ...]) -> bool:
    ordered = sorted(chosen, key=lambda gap: gap.start)
    return all(a.stop < b.start for a, b in pairwise(ordered))


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 3), st.integers(1, 5), st.floats(0, 4)),
        max_size=9,
    ),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.5]),
)
def test_the_knapsack_is_exact(
    rows: list[tuple[int, int, int, float]], need: int, price: float
) -> None:
    gaps = gaps_of(rows)
    sums = [
        sum(gap.loss + price for gap in chosen)
        for count in range(len(gaps) + 1)
        for chosen in combinations(gaps, count)
        if apart(chosen) and sum(gap.freed for gap in chosen) >= need
    ]
    found = cheapest(gaps, need, price)
    if found is None:
        assert not sums
        return
    assert apart(found)
    assert sum(gap.freed for gap in found) >= need
    assert sum(gap.loss + price for gap in found) == pytest.approx(min(sums))


def test_a_price_for_each_gap_makes_fewer() -> None:
    gaps = gaps_of([(0, 1, 1, 0.1), (2, 1, 1, 0.1), (4, 1, 1, 0.1), (6, 3, 3, 0.4)])
    few, many = cheapest(gaps, 3, 1.0), cheapest(gaps, 3)
    assert few is not None
    assert many is not None
    assert (len(few), len(many)) == (1, 3)


def test_gaps_of_two_stacks_may_touch() -> None:
    space = two_stacks(4, 4)
    gaps = gaps_of([(6, 2, 2, 0.01), (8, 2, 2, 0.01), (0, 2, 2, 1.0), (12, 2, 2, 1.0)])
    assert added_up(space, gaps, [1.0] * 16)[0].mask == space.dense.without(range(6, 10))


def test_no_gap_reaches_into_the_next_stack() -> None:
    space = two_stacks(4, 2)
    none = {m: Evaluation(m, (0.0,), 8) for m in (space.dense, *space.removals(space.dense))}
    asked = next(gap_plan(space, 2, none))
    longer = {p.mask.runs for p in asked.proposals}
    assert ((2, 4),) in longer
    assert ((3, 5),) not in longer


@pytest.mark.parametrize("name", ["sublayer", "packable", "packable_protected", "block"])
def test_masks_are_on_budget(name: str) -> None:
    space = SPACES[name]
    searcher = build_searcher(
        "evolution",
        space,
        Landscape(len(space.sites)).hints(),
        np.random.default_rng(0),
        {"longest_gap": 4},
    )
    landscape = Landscape(len(space.sites))
    asked = proposals(drive(searcher, lambda p: landscape.evaluate(p.mask), limit=400))
    measured = [p for p in asked if p.origin == "gap"]
    assert all(len(p.mask.runs) == 1 and space.contains(p.mask) for p in measured)
    assert all(len(p.mask.dropped) <= 4 for p in measured)
    together = [p for p in asked if p.origin == GAPS]
    assert all(space.on_budget(p.mask) and p.final for p in together)


def test_gaps_that_cost_nothing_are_made_longer() -> None:
    space = toy(6)

    def harm(mask: Mask) -> Evaluation:
        return Evaluation(mask, (float(not set(mask.dropped) <= {4, 5}),), 8)

    singles = {mask: harm(mask) for mask in (space.dense, *space.removals(space.dense))}
    found = ()
    plan = gap_plan(space, 3, singles)
    asked = next(plan, None)
    while asked is not None:
        answers = {p.mask: harm(p.mask) for p in asked.proposals}
        try:
            asked = plan.send(answers)
        except StopIteration as ended:
            asked, found = None, ended.value
    losses = {(gap.start, gap.stop): gap.loss for gap in found}
    assert [losses[place] for place in ((4, 5), (5, 6), (4, 6))] == [0.0, 0.0, 0.0]


def test_gaps_that_add_up_are_found_at_once() -> None:
    """Where losses do add up, nothing on budget is better than the first proposal."""
    space: SearchSpace = toy(6)
    rng = np.random.default_rng(3)
    worth = rng.uniform(0.1, 1.0, len(space.sites))
    frees = np.array([1, 3] * 6)
    gaps = [
        Gap(start, stop, int(frees[start:stop].sum()), float(worth[start:stop].sum()))
        for start in range(12)
        for stop in range(start + 1, 13)
    ]
    first = added_up(space, gaps, [0.0] * len(space.genes))[0].mask
    every = space.enumerate()
    assert every is not None

    def lost(dropped: tuple[int, ...]) -> float:
        return float(worth[list(dropped)].sum())

    assert lost(first.dropped) == pytest.approx(min(lost(mask.dropped) for mask in every))
