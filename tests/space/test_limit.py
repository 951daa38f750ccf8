from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from tests.searchers.landscapes import costs, sites, toy

from depthsearch.errors import BudgetError
from depthsearch.space import (
    Budget,
    CostTable,
    Mask,
    SearchSpace,
    SiteCosts,
    is_packable,
)

PARAMS = Budget("params", ratio=0.75, of="blocks")


def both(params: float, cache: float) -> Budget:
    return Budget("params", ratio=params, of="blocks", also=Budget("kv_bytes", ratio=cache))


def uneven(blocks: int) -> CostTable:
    """Costs that differ by block, and a cache that two neighbouring blocks share."""
    params = SiteCosts(7, tuple(3 + (5 * i) % 7 for i in range(2 * blocks)))
    alone = tuple(0 if i % 2 or i < 4 else 2 + i % 3 for i in range(2 * blocks))
    return CostTable({"params": params, "kv_bytes": SiteCosts(1, alone, (((0, 2), 6),))})


SPACES = {
    "sublayers": toy(5, both(0.7, 0.5)),
    "mostly the cache": toy(5, both(0.95, 0.4)),
    "only parameters": toy(5, both(0.5, 1.0)),
    "packable": toy(6, both(0.75, 0.6), packable=True),
    "packable, uneven, protected": SearchSpace(
        sites(6), uneven(6), both(0.8, 0.75), "sublayer", frozenset({4, 9}), True
    ),
    "uneven": SearchSpace(sites(5), uneven(5), both(0.8, 0.5)),
    "blocks": toy(8, both(0.8, 0.7), granularity="block"),
    "attention": toy(9, both(0.9, 0.6), granularity="attention", protected=(0,)),
    "a count besides": toy(5, Budget("sites", drop=3, also=Budget("kv_bytes", ratio=0.5))),
}


def cost(space: SearchSpace, metric: str, mask: Mask) -> int:
    if metric == "sites":
        return len(mask.kept)
    table = space.costs.of(metric)
    return (
        table.fixed
        + sum(c for c, kept in zip(table.sites, mask.keep, strict=True) if kept)
        + sum(a for part, a in table.shared if any(mask.keep[i] for i in part))
    )


def caps(space: SearchSpace) -> dict[str, int]:
    """By hand: what each part of the budget allows."""
    found = {}
    for part in space.budget.parts:
        dense = cost(space, part.metric, space.dense)
        if part.drop is not None:
            found[part.metric] = dense - part.drop
            continue
        assert part.ratio is not None
        fixed = space.costs.of(part.metric).fixed if part.of == "blocks" else 0
        found[part.metric] = fixed + int(part.ratio * (dense - fixed) + 1e-9)
    return found


def all_masks(space: SearchSpace) -> list[Mask]:
    found = []
    for keep in itertools.product((True, False), repeat=len(space.genes)):
        mask = space.dense.without(
            i for gene, kept in zip(space.genes, keep, strict=True) if not kept for i in gene
        )
        if not space.packable or is_packable(mask, space.sites):
            found.append(mask)
    return found


def brute_force(space: SearchSpace) -> set[Mask]:
    """Masks within both caps that no larger mask of the space within both contains."""
    allowed = caps(space)
    fitting = [
        mask
        for mask in all_masks(space)
        if all(cost(space, metric, mask) <= cap for metric, cap in allowed.items())
    ]
    return {
        mask
        for mask in fitting
        if not any(o != mask and set(o.dropped) < set(mask.dropped) for o in fitting)
    }


@pytest.mark.parametrize("name", SPACES)
def test_on_budget_is_maximal_within_both_caps(name: str) -> None:
    space = SPACES[name]
    expected = brute_force(space)
    assert len(expected) > 1
    assert {limit.metric: limit.cap for limit in space.limits} == caps(space)
    assert {mask for mask in all_masks(space) if space.on_budget(mask)} == expected
    listed = space.enumerate()
    assert listed is not None
    assert (set(listed), len(listed)) == (expected, len(expected))


@pytest.mark.parametrize("name", SPACES)
def test_every_way_to_a_mask_ends_within_both_caps(name: str) -> None:
    space, rng = SPACES[name], np.random.default_rng(0)
    expected, genes = brute_force(space), len(space.genes)
    for mask in expected:
        # Every mask on budget is reached by some keys: those that say what it keeps.
        keys = [float(mask.keep[gene[0]]) for gene in space.genes]
        assert space.decode(keys) == mask
        assert space.repair(mask, rng) == mask
    for _ in range(100):
        keys = rng.random(genes).tolist()
        assert space.decode(keys) in expected
        anything = Mask(tuple((rng.random(len(space.sites)) < rng.random()).tolist()))
        assert space.repair(anything, rng) in expected
    assert space.fill(space.smallest(), [0.0] * genes) in expected
    windows = space.windows()
    assert windows
    assert expected.issuperset(windows)


def test_what_a_met_cost_is_lowered_by_is_not_dropped() -> None:
    space = SPACES["mostly the cache"]
    # 95 % of the parameters is met by any three attention sublayers that halve the cache.
    mask = space.repair(space.dense, np.random.default_rng(0))
    assert mask.dropped
    assert all(space.sites[i].kind == "attention" for i in mask.dropped)


def test_the_smallest_mask_fits_both_where_any_does() -> None:
    """Odd stretches must keep one sublayer; here the cheapest in one cost is dear in the other."""
    params = SiteCosts(0, (9, 1, 1, 1, 9, 1, 5, 1))
    cache = SiteCosts(0, (0, 0, 9, 0, 3, 0, 4, 0))
    table = CostTable({"params": params, "kv_bytes": cache})

    def space(most_params: int, most_cache: int) -> SearchSpace:
        budget = Budget("params", cap=most_params, also=Budget("kv_bytes", cap=most_cache))
        return SearchSpace(sites(4), table, budget, "sublayer", frozenset({7}), True)

    fitting = [
        (params.of(mask), cache.of(mask))
        for keep in itertools.product((True, False), repeat=7)
        if is_packable(mask := Mask((*keep, True)), sites(4))
    ]
    feasible = 0
    for most_params, most_cache in itertools.product(range(1, 13), range(1, 12)):
        if any(a <= most_params and b <= most_cache for a, b in fitting):
            feasible += 1
            found = space(most_params, most_cache)
            assert found.fits(found.smallest())
            assert found.contains(found.smallest())
        else:
            with pytest.raises(BudgetError, match="cannot be met"):
                space(most_params, most_cache)
    assert 0 < feasible < 12 * 11


def test_which_of_two_caps_can_not_be_met_is_named() -> None:
    fixed = CostTable({**costs(4).metrics, "kv_bytes": SiteCosts(10, (2, 0) * 4)})
    with pytest.raises(BudgetError, match=r"kv_bytes at most 50 %.* allows 9, .* costs 10 "):
        SearchSpace(sites(4), fixed, both(0.75, 0.5))


def test_a_budget_of_two_costs_survives_json_and_reads_well() -> None:
    budget = both(0.75, 0.5)
    assert Budget.from_json(json.loads(json.dumps(budget.to_json()))) == budget
    assert "also" not in PARAMS.to_json()
    assert budget.text == (
        "params at most 75 % of the dense model's blocks and kv_bytes at most 50 % of the dense "
        "model"
    )
    assert budget.parts == (PARAMS, Budget("kv_bytes", ratio=0.5))
    space = replace(toy(4, PARAMS), front=(budget,))
    assert SearchSpace.from_json(json.loads(json.dumps(space.to_json()))) == space


def test_two_caps_of_one_metric_are_refused() -> None:
    with pytest.raises(BudgetError, match="two metrics"):
        replace(PARAMS, also=Budget("params", ratio=0.5))
    with pytest.raises(BudgetError, match="two metrics"):
        replace(PARAMS, also=both(0.9, 0.5))
