"""The knapsack against every choice there is."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthsearch.searchers.knapsack import Removal, _by_bounds, _by_states, cheapest_choices

LOSSES = st.floats(-0.5, 2.0, allow_nan=False)
SINGLES = st.lists(st.tuples(st.integers(1, 9), LOSSES), min_size=1, max_size=9)


def singles(rows: list[tuple[int, float]]) -> list[Removal]:
    return [Removal(i, i + 1, freed, 0, loss) for i, (freed, loss) in enumerate(rows)]


def tight(freed: int, weights: list[int], need: int) -> bool:
    return freed >= need and all(freed - weight < need for weight in weights)


def brute_force(removals: list[Removal], need: int) -> list[float]:
    """The sums of all tight choices of single removals, ascending."""
    sums = []
    for count in range(1, len(removals) + 1):
        for chosen in combinations(removals, count):
            weights = [removal.weight for removal in chosen]
            if tight(sum(weights), weights, need):
                sums.append(sum(removal.increase for removal in chosen))
    return sorted(sums)


@given(SINGLES, st.integers(1, 30), st.integers(1, 4))
def test_both_ways_find_the_best_choices(
    rows: list[tuple[int, float]], need: int, count: int
) -> None:
    removals = singles(rows)
    expected = brute_force(removals, need)[:count]
    states = _by_states(removals, need, count, 10**6)
    bounds, proven = _by_bounds(removals, need, count)
    assert proven
    assert states is not None
    for found in (states, bounds):
        assert [choice.increase for choice in found] == pytest.approx(expected)
        assert len({choice.taken for choice in found}) == len(found)
        for choice in found:
            weights = [removals[r].weight for r in choice.taken]
            assert tight(sum(weights), weights, need)
            assert sum(removals[r].increase for r in choice.taken) == pytest.approx(choice.increase)


@given(
    st.lists(st.integers(0, 4), min_size=3, max_size=9),
    st.lists(LOSSES, min_size=8, max_size=8),
    st.sets(st.integers(0, 7), max_size=2),
    st.integers(1, 14),
    st.integers(1, 3),
)
def test_pairs_on_a_line(
    freed: list[int], losses: list[float], missing: set[int], need: int, count: int
) -> None:
    removals = [
        Removal(i, i + 2, freed[i], freed[i + 1], losses[i])
        for i in range(len(freed) - 1)
        if i not in missing and freed[i] + freed[i + 1]
    ]
    sums = []
    for size in range(1, len(removals) + 1):
        for chosen in combinations(removals, size):
            if any(a.stop > b.start for a, b in pairwise(chosen)):
                continue
            runs: list[list[Removal]] = []
            for removal in chosen:
                if runs and runs[-1][-1].stop == removal.start:
                    runs[-1].append(removal)
                else:
                    runs.append([removal])
            # Any first site can be put back together with any second one that comes behind it.
            back = [a.first + b.second for run in runs for k, a in enumerate(run) for b in run[k:]]
            if tight(sum(removal.weight for removal in chosen), back, need):
                sums.append(sum(removal.increase for removal in chosen))
    found, proven = cheapest_choices(removals, need, count)
    assert proven
    assert [choice.increase for choice in found] == pytest.approx(sorted(sums)[:count])


def test_a_hand_worked_choice() -> None:
    # Freeing 5: the cheapest two by loss free too little, and 0 with 1 costs less than 2 alone.
    removals = singles([(3, 0.3), (2, 0.1), (5, 0.5), (1, 0.05)])
    ((choice,), proven) = cheapest_choices(removals, 5)
    assert proven
    assert choice.taken == (0, 1)
    assert choice.increase == pytest.approx(0.4)


def test_a_gain_is_not_taken_where_the_budget_is_met_without_it() -> None:
    # Taking both has the lowest sum, but then removal 1 could be put back.
    removals = singles([(4, 0.2), (1, -0.1)])
    ((choice,), _) = cheapest_choices(removals, 4)
    assert choice.taken == (0,)


def test_branches_with_gains_only_are_bounded_by_all_of_them() -> None:
    # The best frees nine times what is needed, at the worst price of the three.
    removals = singles([(1, -0.1), (1, -0.09), (9, -0.5)])
    ((choice,), _) = _by_bounds(removals, 1, 1)
    assert choice.taken == (2,)


def test_what_cannot_be_freed_is_nothing() -> None:
    assert cheapest_choices(singles([(1, 0.1), (2, 0.1)]), 4) == ((), True)
    assert cheapest_choices([], 1) == ((), True)
    assert _by_bounds([], 1, 1) == ((), True)


def test_too_many_states_go_to_branch_and_bound_and_pairs_to_nothing() -> None:
    rng = np.random.default_rng(0)
    rows = [
        (int(f), float(x)) for f, x in zip(rng.integers(1, 99, 14), rng.random(14), strict=True)
    ]
    removals = singles(rows)
    few, proven = cheapest_choices(removals, 300, most_states=3)
    assert proven
    assert few[0].increase == pytest.approx(brute_force(removals, 300)[0])
    pairs = [Removal(r.start, r.start + 2, r.first, 1, r.increase) for r in removals]
    assert cheapest_choices(pairs, 300, most_states=3) == ((), False)


def test_a_deep_model_with_many_sizes_is_solved() -> None:
    # 160 removals of 160 sizes: far more sums than are followed.
    rng = np.random.default_rng(1)
    freed, losses = rng.integers(10**6, 10**7, 160), rng.lognormal(-3, 1, 160)
    rows = [(int(f), float(x)) for f, x in zip(freed, losses, strict=True)]
    removals = singles(rows)
    need = int(freed.sum()) // 4
    ((choice,), proven) = cheapest_choices(removals, need)
    assert proven
    order = sorted(range(160), key=lambda r: losses[r] / freed[r])
    covered = np.cumsum(freed[order])
    greedy = order[: int(np.searchsorted(covered, need)) + 1]
    last = greedy[-1]
    most = float(losses[greedy].sum())
    spare = int(covered[len(greedy) - 1]) - need
    assert most - losses[last] * spare / freed[last] <= choice.increase <= most
