"""Random masks on budget: which they are, and when there are no more."""

from __future__ import annotations

import numpy as np
import pytest
from landscapes import Landscape, costs, drive, proposals, sites, toy

from depthsearch.searchers import build_searcher
from depthsearch.searchers.random import FreshMasks
from depthsearch.space import Budget, CostTable, SearchSpace, SiteCosts


def one_heavy_gene_is_enough(blocks: int, ffn: int) -> SearchSpace:
    """One FFN frees what the budget needs, or so many attention sublayers."""
    table = costs(blocks, 1, ffn)
    return SearchSpace(sites(blocks), table, Budget("params", cap=10 + blocks * (1 + ffn) - ffn))


def one_heavy_block_is_enough() -> SearchSpace:
    """Every third block frees what the budget needs, or any ten of the others."""
    table = SiteCosts(0, (50, 50, 5, 5, 5, 5) * 12)
    budget = Budget("params", cap=12 * 120 - 100)
    return SearchSpace(sites(36), CostTable({"params": table}), budget, "block")


@pytest.mark.parametrize("space", [one_heavy_gene_is_enough(24, 12), one_heavy_block_is_enough()])
def test_a_large_space_goes_on_where_one_heavy_gene_is_enough(space: SearchSpace) -> None:
    assert space.enumerate() is None
    fresh = FreshMasks(space, np.random.default_rng(0))
    found = [fresh.take(16) for _ in range(6)]
    assert [len(masks) for masks in found] == [16] * 6
    asked = [mask for masks in found for mask in masks]
    assert len(set(asked)) == len(asked)
    assert all(space.on_budget(mask) for mask in asked)


@pytest.mark.parametrize("method", ["random", "evolution"])
def test_no_search_ends_while_much_of_the_space_remains(method: str) -> None:
    space, landscape = one_heavy_gene_is_enough(24, 12), Landscape(48)
    rng = np.random.default_rng(0)
    searcher = build_searcher(method, space, landscape.hints(), rng, {})
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=150)
    assert len(proposals(record)) >= 150


def test_what_is_drawn_alike_comes_first_and_stays_as_it_was() -> None:
    space = toy(12)
    rng = np.random.default_rng(3)
    alike = [space.decode(rng.random(24).tolist()) for _ in range(60)]
    assert FreshMasks(space, np.random.default_rng(3)).take(40) == list(dict.fromkeys(alike))[:40]


def test_a_small_space_is_listed_to_its_end() -> None:
    space = toy(6)
    every = space.enumerate()
    assert every is not None
    fresh = FreshMasks(space, np.random.default_rng(0))
    found = fresh.take(len(every) + 5)
    assert fresh.listed
    assert sorted(mask.key for mask in found) == sorted(mask.key for mask in every)
    assert fresh.take(1) == []
