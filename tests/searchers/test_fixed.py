"""Masks by position, against the blocks that the papers name."""

from __future__ import annotations

import numpy as np
import pytest
from landscapes import SPACES, Landscape, costs, drive, proposals, toy

from depthsearch.errors import ConfigError
from depthsearch.searchers import build_searcher
from depthsearch.searchers.fixed import fixed_mask
from depthsearch.space import Budget, Kind, Mask, SearchSpace, Site

STRATEGIES = ("top", "bottom", "odd", "even", "symmetric", "deepest_but_last")


def blocks(space: SearchSpace, mask: Mask) -> list[int]:
    """The blocks of which something was dropped, counted from 1."""
    return sorted({space.sites[i].block + 1 for i in mask.dropped})


@pytest.mark.parametrize(
    ("strategy", "four", "eight"),
    [
        ("top", [9, 10, 11, 12], [5, 6, 7, 8, 9, 10, 11, 12]),
        ("bottom", [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]),
        ("odd", [5, 7, 9, 11], [1, 3, 5, 7, 9, 10, 11, 12]),
        ("even", [6, 8, 10, 12], [2, 4, 6, 8, 9, 10, 11, 12]),
        ("symmetric", [5, 6, 7, 8], [3, 4, 5, 6, 7, 8, 9, 10]),
        ("deepest_but_last", [8, 9, 10, 11], [4, 5, 6, 7, 8, 9, 10, 11]),
    ],
)
def test_twelve_blocks(strategy: str, four: list[int], eight: list[int]) -> None:
    for count, expected in ((4, four), (8, eight)):
        space = toy(12, Budget("blocks", drop=count), "block")
        assert blocks(space, fixed_mask(space, strategy)) == expected
        # As many parameters as so many blocks: the same whole blocks, sublayer by sublayer.
        for packable in (False, True):
            ratio = Budget("params", ratio=(12 - count) / 12, of="blocks")
            space = toy(12, ratio, packable=packable)
            mask = fixed_mask(space, strategy)
            assert blocks(space, mask) == expected
            assert len(mask.dropped) == 2 * count


def test_an_odd_middle_of_an_even_depth_leans_to_the_deeper_side() -> None:
    for count, expected in ((1, [7]), (3, [6, 7, 8])):
        space = toy(12, Budget("blocks", drop=count), "block")
        assert blocks(space, fixed_mask(space, "symmetric")) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_kind_of_sublayer_goes_in_the_same_order(strategy: str) -> None:
    whole = toy(12, Budget("blocks", drop=4), "block")
    expected = blocks(whole, fixed_mask(whole, strategy))
    for kind, metric in (("attention", "kv_bytes"), ("ffn", "params")):
        ratio = 8 / 12 if metric == "kv_bytes" else 1 - 0.75 * 4 / 12
        budget = Budget(metric, ratio=ratio, of="blocks")  # type: ignore[arg-type]
        space = toy(12, budget, kind)
        mask = fixed_mask(space, strategy)
        assert blocks(space, mask) == expected
        assert {space.sites[i].kind for i in mask.dropped} == {kind}


def test_what_fits_is_put_back_where_dropping_ended() -> None:
    # 30 % of 40 is 12: three blocks. 27.5 % is 11: of the third block only the FFN goes.
    space = toy(10, Budget("params", ratio=0.725, of="blocks"))
    mask = fixed_mask(space, "top")
    assert mask.dropped == (15, 16, 17, 18, 19)
    assert fixed_mask(space, "bottom").dropped == (0, 1, 2, 3, 5)


def test_protected_blocks_are_passed_over() -> None:
    space = toy(6, Budget("blocks", drop=2), "block", protected=(10, 11))
    assert blocks(space, fixed_mask(space, "top")) == [4, 5]
    assert blocks(space, fixed_mask(space, "deepest_but_last")) == [4, 5]
    assert blocks(space, fixed_mask(space, "even")) == [2, 4]


def test_blocks_protected_in_part_give_their_free_sites_when_nothing_else_is_left() -> None:
    space = toy(3, Budget("sites", drop=3), protected=(3, 5))
    assert fixed_mask(space, "bottom").dropped == (0, 1, 2)
    assert fixed_mask(space, "top").dropped == (0, 2, 4)


def two_stacks(encoder: int, decoder: int, drop: int) -> SearchSpace:
    """Blocks of an encoder, then of a decoder with cross-attention."""
    found: list[Site] = []
    kinds: tuple[tuple[str, int, tuple[Kind, ...]], ...] = (
        ("encoder", encoder, ("attention", "ffn")),
        ("decoder", decoder, ("attention", "cross_attention", "ffn")),
    )
    for stack, count, members in kinds:
        for block in range(count):
            found += [
                Site(len(found) + place, stack, block, kind) for place, kind in enumerate(members)
            ]
    table = costs(0)
    return SearchSpace(tuple(found), table, Budget("blocks", drop=drop), "block")


def test_stacks_take_turns() -> None:
    def dropped(space: SearchSpace, strategy: str) -> dict[str, list[int]]:
        found: dict[str, set[int]] = {"encoder": set(), "decoder": set()}
        for i in fixed_mask(space, strategy).dropped:
            found[space.sites[i].stack].add(space.sites[i].block + 1)
        return {stack: sorted(numbers) for stack, numbers in found.items()}

    even = two_stacks(6, 6, 4)
    assert dropped(even, "top") == {"encoder": [5, 6], "decoder": [5, 6]}
    assert dropped(even, "symmetric") == {"encoder": [3, 4], "decoder": [3, 4]}
    assert dropped(even, "deepest_but_last") == {"encoder": [4, 5], "decoder": [4, 5]}
    # A stack twice as deep loses twice as many.
    assert dropped(two_stacks(8, 4, 6), "bottom") == {"encoder": [1, 2, 3, 4], "decoder": [1, 2]}


@pytest.mark.parametrize("name", SPACES)
def test_all_proposes_each_mask_once_and_names_every_strategy(name: str) -> None:
    space = SPACES[name]
    rng = np.random.default_rng(0)
    searcher = build_searcher("fixed", space, Landscape(len(space.sites)).hints(), rng, {})
    asked = proposals(drive(searcher, lambda p: Landscape(len(space.sites)).evaluate(p.mask)))
    named = {
        strategy: proposal.mask
        for proposal in asked
        for strategy in proposal.origin.removeprefix("fixed ").split(" and ")
    }
    assert named == {strategy: fixed_mask(space, strategy) for strategy in STRATEGIES}
    assert all(proposal.final and space.on_budget(proposal.mask) for proposal in asked)


def test_a_wrong_strategy_is_refused() -> None:
    space = SPACES["block"]
    with pytest.raises(ConfigError, match="one of all, top, bottom"):
        build_searcher(
            "fixed",
            space,
            Landscape(16).hints(),
            np.random.default_rng(0),
            {"strategy": "middle"},
        )
