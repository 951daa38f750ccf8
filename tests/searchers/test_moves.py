"""Moves of the evolution: always on budget, and each does what its name says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from landscapes import SPACES, toy, two_stacks

from depthsearch.searchers.moves import (
    Moves,
    dropped_runs,
    exchange_neighbours,
    weighted_index,
)
from depthsearch.space import Budget, Mask, SearchSpace, SiteCosts

LARGE: dict[str, SearchSpace] = {
    **SPACES,
    "large": toy(30),
    "large_packable": toy(30, packable=True, protected=(0, 1, 2, 31, 59)),
    "large_attention": toy(30, Budget("kv_bytes", ratio=0.6), "attention"),
    "two_stacks": two_stacks(8),
}
NAMES = Moves(SPACES["sublayer"], np.random.default_rng(0)).names


def random_mask(space: SearchSpace, rng: np.random.Generator) -> Mask:
    return space.decode(rng.random(len(space.genes)).tolist())


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(LARGE)),
    move=st.sampled_from(NAMES),
    seed=st.integers(0, 2**32),
    guided=st.booleans(),
)
def test_every_move_stays_on_budget(name: str, move: str, seed: int, guided: bool) -> None:
    space, rng = LARGE[name], np.random.default_rng(seed)
    moves = Moves(space, rng, rng.random(len(space.genes)).tolist() if guided else None)
    mask, other = random_mask(space, rng), random_mask(space, rng)
    for _ in range(3):
        child = moves.apply(move, mask, other)
        if child is not None:
            assert space.on_budget(child)
            mask = child


@pytest.mark.parametrize("name", ["large", "large_packable", "large_attention", "block", "ffn"])
@pytest.mark.parametrize("move", NAMES)
def test_every_move_finds_something_new(name: str, move: str) -> None:
    space, rng = LARGE[name], np.random.default_rng(1)
    moves = Moves(space, rng)
    new = 0
    for _ in range(30):
        mask, other = random_mask(space, rng), random_mask(space, rng)
        child = moves.apply(move, mask, other)
        new += child is not None and child != mask
    # Two dropped blocks out of eight are rarely neighbours, so a split seldom applies there.
    assert new >= (3 if (name, move) == ("block", "split") else 10)


def count_space() -> SearchSpace:
    """Twenty sites, any six of which go: no repair interferes with a run move."""
    return toy(10, Budget("sites", drop=6))


@pytest.mark.parametrize(
    ("move", "dropped", "runs"),
    [
        ("shift", range(6, 12), {1}),
        ("slide", range(6, 12), {1}),
        ("split", range(6, 12), {2, 3}),
        ("merge", (2, 3, 10, 11, 12, 13), {1}),
    ],
)
def test_run_moves_keep_the_shape_they_promise(
    move: str, dropped: tuple[int, ...], runs: set[int]
) -> None:
    space = count_space()
    mask = Mask.dropping(20, dropped)
    found = {
        Moves(space, np.random.default_rng(seed)).apply(move, mask, mask) for seed in range(60)
    }
    assert len(found) > 1
    for child in found:
        if child is not None and child != mask:
            assert len(child.dropped) == 6
            # A part that is put back at the end of the run and dropped beside it stays one run.
            assert len(child.runs) in runs | ({1} if move == "split" else set())


def test_a_shift_moves_by_one_to_three() -> None:
    mask = Mask.dropping(20, range(6, 12))
    moves = Moves(count_space(), np.random.default_rng(0))
    starts = {child.dropped[0] for _ in range(60) if (child := moves.apply("shift", mask, mask))}
    assert starts == {3, 4, 5, 7, 8, 9}


def test_a_swap_exchanges_one_for_one_under_a_count() -> None:
    mask = Mask.dropping(20, range(6, 12))
    moves = Moves(count_space(), np.random.default_rng(0))
    for _ in range(30):
        child = moves.apply("swap", mask, mask)
        assert child is not None
        assert len(set(child.dropped) - set(mask.dropped)) == 1
        assert len(set(mask.dropped) - set(child.dropped)) == 1


def test_swaps_trade_attention_for_ffn() -> None:
    space = toy(30)
    mask = space.windows()[0]
    moves = Moves(space, np.random.default_rng(0))
    kinds = set()
    for _ in range(100):
        child = moves.apply("swap", mask, mask)
        assert child is not None
        kinds.add(sum(space.sites[i].kind == "ffn" for i in child.dropped))
    assert len(kinds) > 1


def test_crossover_drops_only_what_a_parent_drops() -> None:
    space = count_space()
    one, two = Mask.dropping(20, range(4, 10)), Mask.dropping(20, range(7, 13))
    moves = Moves(space, np.random.default_rng(0))
    children = [moves.apply("crossover", one, two) for _ in range(20)]
    dropped = [set(child.dropped) for child in children if child is not None]
    assert all(sites <= set(range(4, 13)) for sites in dropped)
    # Averaged keys always drop what both drop; one cut may lose some of it.
    assert sum({7, 8, 9} <= sites for sites in dropped) >= 10
    assert len(set(children) - {one, two}) > 5
    assert moves.apply("crossover", one, one) is None


def test_guidance_prefers_unimportant_genes() -> None:
    space = toy(10, Budget("sites", drop=1))
    keys = [float(g) for g in range(20)]
    mask = Mask.dropping(20, [10])
    dropped = []
    moves = Moves(space, np.random.default_rng(0), keys)
    for _ in range(600):
        child = moves.apply("swap", mask, mask)
        assert child is not None
        dropped.append(child.dropped[0])
    low = sum(i < 10 for i in dropped)
    # Weights run from 3 down to 1, so the lower half gets about 5/8 of the draws.
    assert 0.56 < low / 600 < 0.71


def test_dropped_runs_and_weighted_index() -> None:
    assert dropped_runs([True, False, False, True, False]) == [(1, 3), (4, 5)]
    rng = np.random.default_rng(0)
    draws = [weighted_index(rng, [0.0, 1.0, 3.0, 0.0]) for _ in range(400)]
    assert set(draws) == {1, 2}
    assert 0.68 < draws.count(2) / 400 < 0.82


@pytest.mark.parametrize(
    ("space", "dropped"),
    [
        (two_stacks(4, 2), (2, 3, 4, 5)),
        (toy(4, Budget("sites", drop=4), protected=(3, 4)), (1, 2, 5, 6)),
    ],
)
def test_gaps_of_two_stacks_or_beside_a_protected_site_move_apart(
    space: SearchSpace, dropped: tuple[int, ...]
) -> None:
    """The first stays where it is, and the second goes to the end, in one shift."""
    mask = Mask.dropping(8, dropped)
    found = {
        Moves(space, np.random.default_rng(seed)).apply("shift", mask, mask) for seed in range(60)
    }
    assert Mask.dropping(8, [*dropped[:2], 6, 7]) in found


def test_moves_on_a_space_with_shared_costs() -> None:
    space = toy(8)
    table = space.costs.of("params")
    shared = tuple(((2 * b, 2 * b + 1), 2) for b in range(8))
    costs = type(space.costs)({"params": SiteCosts(table.fixed, table.sites, shared)})
    parallel = SearchSpace(space.sites, costs, space.budget)
    rng = np.random.default_rng(0)
    moves = Moves(parallel, rng)
    for name in NAMES:
        for _ in range(20):
            child = moves.apply(name, random_mask(parallel, rng), random_mask(parallel, rng))
            assert child is None or parallel.on_budget(child)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(SPACES)), seed=st.integers(0, 10_000))
def test_exchanges_stay_on_budget_and_open_no_new_gap_when_they_put_back(
    name: str, seed: int
) -> None:
    space = SPACES[name]
    rng = np.random.default_rng(seed)
    mask = space.repair(space.dense, rng)
    keys = [float(key) for key in rng.random(len(space.genes))]
    found = exchange_neighbours(space, mask, keys)
    assert mask not in found
    assert len(set(found)) == len(found)
    assert all(space.on_budget(other) for other in found)


def test_exchanges_come_in_order_of_what_they_promise() -> None:
    space = toy(4, Budget("sites", drop=2))
    mask = Mask.dropping(8, [2, 3])
    keys = [0.9, 0.8, 0.5, 0.4, 0.1, 0.2, 0.3, 0.7]
    found = exchange_neighbours(space, mask, keys)
    assert found[0] == Mask.dropping(8, [3, 4])
    change = [sum(keys[i] for i in other.dropped) for other in found]
    assert change == sorted(change)


@pytest.mark.parametrize(
    ("packable", "ends"), [(False, {8, 11, 12, 15}), (True, set(range(8, 16)))]
)
def test_exchanges_put_back_what_is_at_the_end_of_a_stack(packable: bool, ends: set[int]) -> None:
    """Two gaps, though they touch: the last two blocks of one stack, the first two of the next."""
    space = two_stacks(8, packable=packable)
    mask = space.dense.without(range(8, 16))
    found = exchange_neighbours(space, mask, [1.0] * 24)
    assert {i for other in found for i in other.kept if not mask.keep[i]} == ends


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(SPACES)), seed=st.integers(0, 10_000))
def test_exchanges_above_the_budget_cost_no_more(name: str, seed: int) -> None:
    space = SPACES[name]
    rng = np.random.default_rng(seed)
    keys = [float(key) for key in rng.random(len(space.genes))]
    mask = space.dense
    while not space.fits(mask):
        for other in exchange_neighbours(space, mask, keys):
            assert other != mask
            assert space.contains(other)
            assert space.cost(other) <= space.cost(mask)
            assert space.fits(other) == space.on_budget(other)
            assert set(mask.dropped) - set(other.dropped)
        smaller = space.removals(mask)
        if not smaller:
            break
        mask = smaller[int(rng.integers(len(smaller)))]
