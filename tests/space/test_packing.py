"""Packability and re-pairing on masks worked out by hand."""

from __future__ import annotations

import pytest

from depthsearch.errors import MaskError
from depthsearch.space import Mask, Site, is_packable, pairing

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
    assert pairing(Mask.from_key(key), SITES) == pairs


@pytest.mark.parametrize("key", ["01111111", "11111110", "10111101", "11000111"])
def test_odd_runs_do_not_re_pair(key: str) -> None:
    mask = Mask.from_key(key)
    assert not is_packable(mask, SITES)
    with pytest.raises(MaskError, match="an odd number; search with 'packable: true'"):
        pairing(mask, SITES)


def test_each_stack_alternates_on_its_own() -> None:
    assert is_packable(Mask.from_key("11000011"), TWO)
    assert not is_packable(Mask.from_key("11100111"), TWO)
    with pytest.raises(MaskError, match="a single stack"):
        pairing(Mask.dense(8), TWO)


def test_a_model_with_cross_attention_does_not_re_pair() -> None:
    kinds = ("attention", "cross_attention", "ffn")
    sites = tuple(Site(i, "decoder", i // 3, kinds[i % 3]) for i in range(6))  # type: ignore[arg-type]
    assert not is_packable(Mask.dense(6), sites)
    with pytest.raises(MaskError, match="does not alternate attention and FFN"):
        pairing(Mask.dense(6), sites)
