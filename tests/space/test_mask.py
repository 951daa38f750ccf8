"""Masks and sites: identity, runs, names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthsearch.errors import MaskError
from depthsearch.space import Mask, Site, mask_from_names, parse_site_name

SITES = tuple(Site(i, "decoder", i // 2, ("attention", "ffn")[i % 2]) for i in range(8))


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_a_mask_is_its_key(keep: list[bool]) -> None:
    mask = Mask(tuple(keep))
    assert Mask.from_key(mask.key) == mask
    assert Mask.from_json(mask.to_json()) == mask
    assert Mask.dropping(len(keep), mask.dropped) == mask
    assert sorted(mask.kept + mask.dropped) == list(range(len(mask)))
    assert [i for start, stop in mask.runs for i in range(start, stop)] == list(mask.dropped)
    assert all(left[1] < right[0] for left, right in zip(mask.runs, mask.runs[1:], strict=False))
    assert mask.without(mask.kept).key == "0" * len(keep)
    assert mask.with_(mask.dropped) == Mask.dense(len(keep))


def test_without_and_with_undo_each_other() -> None:
    mask = Mask.from_key("11011")
    assert mask.without([0, 1]).key == "00011"
    assert mask.with_([2, 3]).key == "11111"
    assert mask.without([0]).with_([0]) == mask


@pytest.mark.parametrize("key", ["", "1101x", "11 0", "2"])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(MaskError, match="is not a mask key: expected one '1' or '0'"):
        Mask.from_key(key)


def test_masks_by_name_drop_sites_and_whole_blocks() -> None:
    mask = mask_from_names(SITES, ["decoder.1", "decoder.3.ffn"])
    assert mask.key == "11001110"
    assert mask_from_names(SITES, []) == Mask.dense(8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decoder.4.ffn", "no site 'decoder.4.ffn': its sites run from decoder.0.attention to"),
        ("encoder.1.ffn", "no site 'encoder.1.ffn'"),
        ("decoder.9", "is not a site name: expected <stack>"),
        ("decoder.1.mlp", "kind one of attention, cross_attention, ffn"),
        ("", "'' is not a site name"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        mask_from_names(SITES, [name])


@given(
    st.from_regex(r"[A-Za-z_]{1,12}", fullmatch=True),
    st.integers(0, 999),
    st.sampled_from(["attention", "cross_attention", "ffn"]),
)
def test_site_names_and_json_round_trip(stack: str, block: int, kind: str) -> None:
    site = Site(7, stack, block, kind)  # type: ignore[arg-type]
    assert parse_site_name(site.name) == (stack, block, kind)
    assert Site.from_json(site.to_json()) == site


def test_an_unknown_kind_is_refused() -> None:
    data = SITES[0].to_json() | {"kind": "mixer"}
    with pytest.raises(MaskError, match="'mixer' is not a kind of site"):
        Site.from_json(data)
