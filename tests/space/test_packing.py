"""Packability and re-pairing on masks worked out by hand."""

from __future__ import annotations

import pytest

from depthsearch.errors import MaskError
from depthsearch.space import (
    KINDS,
    Budget,
    CostTable,
    Mask,
    SearchSpace,
    Site,
    SiteCosts,
    is_packable,
)
from depthsearch.space.packing import interruption, new_blocks

SITES = tuple(Site(i, "decoder", i // 2, ("attention", "ffn")[i % 2]) for i in range(8))
TWO = tuple(
    Site(i, stack, i // 2 % 2, ("attention", "ffn")[i % 2])
    for i, stack in enumerate(["encoder"] * 4 + ["decoder"] * 4)
)


@pytest.mark.parametrize(
    ("key", "pairs"),
    [
        ("11111111", ((0, 0), (1, 1), (2, 2), (3, 3))),
        ("11001111", ((0, 0), (2, 2), (3, 3))),
        ("10011111", ((0, 1), (2, 2), (3, 3))),
        ("10000001", ((0, 3),)),
        ("00000000", ()),
    ],
)
def test_alternating_masks_re_pair(key: str, pairs: tuple[tuple[int, int], ...]) -> None:
    assert is_packable(Mask.from_key(key), SITES)
    assert new_blocks(Mask.from_key(key), SITES) == (pairs,)


@pytest.mark.parametrize("key", ["01111111", "11111110", "10111101", "11000111"])
def test_odd_runs_do_not_re_pair(key: str) -> None:
    mask = Mask.from_key(key)
    assert not is_packable(mask, SITES)
    with pytest.raises(MaskError, match="cannot be re-paired"):
        new_blocks(mask, SITES)


def test_each_stack_alternates_on_its_own() -> None:
    assert is_packable(Mask.from_key("11000011"), TWO)
    assert not is_packable(Mask.from_key("11100111"), TWO)
    assert new_blocks(Mask.from_key("11000011"), TWO) == (((0, 0),), ((1, 1),))


READING = tuple(
    Site(i, *place)  # type: ignore[arg-type]
    for i, place in enumerate(
        [("encoder", block, kind) for block in range(3) for kind in ("attention", "ffn")]
        + [("decoder", block, kind) for block in range(3) for kind in KINDS]
    )
)


@pytest.mark.parametrize(
    ("key", "encoder", "decoder"),
    [
        ("111111 111111111", ((0, 0), (1, 1), (2, 2)), ((0, 0, 0), (1, 1, 1), (2, 2, 2))),
        ("110011 000111000", ((0, 0), (2, 2)), ((1, 1, 1),)),
        ("100111 100011111", ((0, 1), (2, 2)), ((0, 1, 1), (2, 2, 2))),
        ("111001 110001111", ((0, 0), (1, 2)), ((0, 0, 1), (2, 2, 2))),
        ("100001 100010001", ((0, 2),), ((0, 1, 2),)),
        ("000000 111000111", (), ((0, 0, 0), (2, 2, 2))),
    ],
)
def test_a_decoder_with_cross_attention_goes_through_three_kinds(
    key: str, encoder: tuple[tuple[int, ...], ...], decoder: tuple[tuple[int, ...], ...]
) -> None:
    mask = Mask.from_key(key.replace(" ", ""))
    assert is_packable(mask, READING)
    assert interruption(mask, READING) is None
    assert new_blocks(mask, READING) == (encoder, decoder)


@pytest.mark.parametrize(
    ("key", "last", "following"),
    [
        ("111111 011111111", None, "decoder.0.cross_attention"),
        ("111111 101111111", "decoder.0.attention", "decoder.0.ffn"),
        ("111111 100111111", "decoder.0.attention", "decoder.1.attention"),
        ("111111 111111110", "decoder.2.cross_attention", None),
        ("111111 111111100", "decoder.2.attention", None),
        ("111110 011111111", "encoder.2.attention", None),
        ("101111 101111111", "encoder.0.attention", "encoder.1.attention"),
    ],
)
def test_what_breaks_the_order_is_named(key: str, last: str | None, following: str | None) -> None:
    mask = Mask.from_key(key.replace(" ", ""))
    found = interruption(mask, READING)
    assert not is_packable(mask, READING)
    assert found is not None
    assert [site and site.name for site in found] == [last, following]
    with pytest.raises(MaskError, match="cannot be re-paired"):
        new_blocks(mask, READING)


def test_a_packable_space_of_a_decoder_with_cross_attention_goes_by_blocks() -> None:
    costs = CostTable({"params": SiteCosts(0, (1,) * len(READING))})
    budget = Budget("sites", drop=6)
    with pytest.raises(MaskError, match="'granularity: block' or 'packable: false'"):
        SearchSpace(READING, costs, budget, packable=True)

    space = SearchSpace(READING, costs, budget, "block", packable=True)

    masks = space.enumerate()
    assert masks
    assert all(is_packable(mask, READING) for mask in masks)
