"""Cheap baselines and the rankings behind them."""

from __future__ import annotations

import pytest
from landscapes import SPACES, Landscape, toy

from depthsearch.searchers import cheap_baselines, is_baseline
from depthsearch.searchers.baselines import span, window_baselines, window_distance
from depthsearch.searchers.ranking import (
    block_influence_keys,
    drop_in_order,
    freed_cost,
    influence_keys,
    per_cost,
    price,
    removal_keys,
)
from depthsearch.space import Budget, CostTable, Hints, Mask, SearchSpace, SiteCosts


@pytest.mark.parametrize("name", SPACES)
def test_baselines_are_distinct_on_budget_and_hold_every_window(name: str) -> None:
    space = SPACES[name]
    found = cheap_baselines(space, Landscape(len(space.sites)).hints())
    masks = [proposal.mask for proposal in found]
    assert len(set(masks)) == len(masks)
    assert set(space.windows()) <= set(masks)
    assert all(space.on_budget(mask) for mask in masks)
    assert all(proposal.final and is_baseline(proposal.origin) for proposal in found)


def test_windows_come_in_order_of_angular_distance() -> None:
    space = SPACES["sublayer"]
    hints = Landscape(12).hints()
    found = window_baselines(space, hints)
    distances = [window_distance(space, proposal.mask, hints) for proposal in found]
    assert distances == sorted(distances)
    assert [p.origin.endswith("best angle") for p in found] == [True] + [False] * (len(found) - 1)


def test_the_distance_of_a_window_is_across_all_of_it() -> None:
    """Where one kind of sublayer alone may go the others between are no part of the gaps."""
    hints = distances(9)
    assert window_distance(toy(4), Mask.from_key("10001111"), hints) == 104
    assert window_distance(toy(4), Mask.from_key("10101011"), hints) == 106
    assert window_distance(toy(4), toy(4).dense, hints) == 0
    attention = toy(4, Budget("kv_bytes", ratio=0.5), "attention")
    free = toy(4, Budget("kv_bytes", ratio=0.5))
    for space in (attention, free):
        assert window_distance(space, Mask.dropping(8, (2, 4)), hints) == 203 + 405
    assert span(free, Mask.dropping(8, (2, 4))) == "1.attention-2.attention"


def test_the_best_angle_is_that_across_a_filled_window() -> None:
    sites = toy(3).sites
    costs = CostTable({"params": SiteCosts(0, (10, 30) * 3)})
    space = SearchSpace(sites, costs, Budget("params", cap=70))
    rows = [[1.0] * 7 for _ in range(7)]
    # Lone FFNs, whose gaps look cheap one by one and are dear together.
    for site in (1, 3, 5):
        rows[site][site + 1] = 0.1
    rows[0][3] = 0.4
    hints = Hints(rows, rows)
    origins = {proposal.mask.key: proposal.origin for proposal in window_baselines(space, hints)}
    assert origins["101011"] == "window 0.ffn-1.ffn, filled"
    assert origins["000111"] == "window 0.attention-1.attention, best angle"


def distances(count: int) -> Hints:
    """Hints in which the distance from state i to state j is 100 i + j."""
    rows = tuple(tuple(float(100 * i + j) for j in range(count)) for i in range(count))
    return Hints(rows, rows)


@pytest.mark.parametrize(
    ("origin", "baseline"),
    [
        ("window 12-18", True),
        ("block influence of sites per cost", True),
        ("single removal", True),
        ("evolution slide", False),
        ("completed prefix 1/4 + gap", False),
        ("greedy step 3", False),
        ("optuna tpe", False),
        ("random", False),
    ],
)
def test_is_baseline(origin: str, baseline: bool) -> None:
    assert is_baseline(origin) == baseline


def test_span_names_whole_blocks_or_sites() -> None:
    space = toy(4)
    assert span(space, Mask.dropping(8, range(2, 6))) == "1-2"
    assert span(space, Mask.dropping(8, range(3, 7))) == "1.ffn-3.attention"
    attention = toy(4, Budget("kv_bytes", ratio=0.5), "attention")
    assert span(attention, Mask.dropping(8, (2, 4))) == "1-2"
    assert span(attention, Mask.dropping(8, (0, 4))) == "0-2, filled"
    assert span(space, Mask.dropping(8, (1, 3, 5))) == "0.ffn-2.ffn, filled"


def hints_with_influence(influence: list[float]) -> Hints:
    """Similarities in which crossing a stretch loses the sum of its sites' influence."""
    n = len(influence) + 1
    rows = tuple(tuple(1.0 - sum(influence[i:j]) for j in range(n)) for i in range(n))
    return Hints(rows, rows)


def test_influence_by_site_and_by_block() -> None:
    space = toy(2)
    hints = hints_with_influence([0.1, 0.2, 0.05, 0.1])
    assert influence_keys(space, hints) == pytest.approx((0.1, 0.2, 0.05, 0.1))
    assert block_influence_keys(space, hints) == pytest.approx((0.3, 0.3, 0.15, 0.15))
    # Attention frees 1 and FFN 3, on average 2.
    assert per_cost(space, (0.3, 0.3, 0.3, 0.3)) == pytest.approx((0.6, 0.2, 0.6, 0.2))


def test_of_two_equal_gains_the_one_that_frees_more_is_the_larger() -> None:
    space = toy(2)
    assert per_cost(space, (-0.3,) * 4) == pytest.approx((-0.15, -0.45, -0.15, -0.45))


def test_block_influence_counts_free_sites_only() -> None:
    space = toy(3, protected=(2,))
    hints = hints_with_influence([0.1, 0.2, 0.4, 0.1, 0.1, 0.1])
    assert block_influence_keys(space, hints) == pytest.approx((0.3, 0.3, 0.1, 0.2, 0.2))


def test_genes_that_free_nothing_keep_their_key() -> None:
    space = SPACES["sublayer_kv"]
    keys = per_cost(space, (1.0,) * 12)
    assert keys == pytest.approx((0.5, 1.0) * 6)


def test_removal_keys_average_the_units_of_a_site() -> None:
    space = SPACES["only_one_mask"]
    keys = removal_keys(space, {(1, 2): 0.2, (2, 3): 0.4}, (9.0, 9.0, 9.0))
    assert keys == pytest.approx((0.2, 0.3, 0.4))
    assert removal_keys(space, {(1,): 0.2, (2,): 0.5}, (9.0, 9.0, 9.0)) == (0.2, 0.5, 0.5)
    assert removal_keys(space, {}, (9.0, 9.0, 9.0)) == (9.0, 9.0, 9.0)


def test_units_are_dropped_in_order_without_overlap() -> None:
    space = toy(4, Budget("params", ratio=0.5, of="blocks"), packable=True)
    order = [(2, 3), (3, 4), (5, 6), (0, 1)]
    mask = drop_in_order(space, order, (1.0,) * 8)
    assert mask == Mask.dropping(8, (2, 3, 5, 6))
    fallback = drop_in_order(space, order[:1], tuple(float(g) for g in range(8)))
    assert space.on_budget(fallback)


def test_freed_cost_counts_what_the_budget_needs() -> None:
    space = toy(2, Budget("params", ratio=0.75, of="blocks"))
    assert freed_cost(space, space.dense, space.dense.without([0])) == 1
    assert freed_cost(space, space.dense, space.dense.without([1])) == 2


def test_price_prefers_to_free_more_for_equal_gains() -> None:
    assert price(0.3, 3) == pytest.approx(0.1)
    assert price(-0.1, 3) < price(-0.1, 1) < price(0.0, 1) < price(0.1, 3) < price(0.1, 1)
