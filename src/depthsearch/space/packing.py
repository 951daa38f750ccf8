"""Packability: can the kept sublayers be re-paired into ordinary blocks?

A stock checkpoint is a list of blocks, each attention then FFN. What a mask keeps can be stored
that way, without custom code, exactly when it still alternates attention, FFN, attention, FFN.
Since the dense sequence alternates, that holds exactly when every run of dropped sites is even.
The blocks of a decoder that reads an encoder's output have a cross-attention between the two, so
what is kept of it has to go through the three kinds in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from depthsearch.errors import MaskError
from depthsearch.space.mask import Mask
from depthsearch.space.site import KINDS, Kind, Site

_TWO: tuple[Kind, ...] = ("attention", "ffn")


def is_packable(mask: Mask, sites: Sequence[Site]) -> bool:
    """Whether the kept sites of every stack form blocks: attention, FFN, attention, FFN.

    In a stack with cross-attention: attention, cross-attention, FFN, and again.
    """
    return interruption(mask, sites) is None


def interruption(mask: Mask, sites: Sequence[Site]) -> tuple[Site | None, Site | None] | None:
    """The first kept sites, neighbours in a stack, that ordinary blocks don't have so; or None.

    The first of them is None where the stack can't start with the second, the second where it
    can't end with the first.
    """
    for stack in stacks_of(sites):
        kinds, last = block_kinds(stack), None
        for place, site in enumerate(_kept(mask, stack)):
            if site.kind != kinds[place % len(kinds)]:
                return last, site
            last = site
        if last is not None and last.kind != kinds[-1]:
            return last, None
    return None


def new_blocks(mask: Mask, sites: Sequence[Site]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each stack its new blocks: the dense block that each of their sublayers comes from.

    Raises MaskError where the mask is not packable.
    """
    if not is_packable(mask, sites):
        raise MaskError("the mask cannot be re-paired into ordinary blocks")
    found = []
    for stack in stacks_of(sites):
        kept, count = _kept(mask, stack), len(block_kinds(stack))
        starts = range(0, len(kept), count)
        found.append(tuple(tuple(s.block for s in kept[i : i + count]) for i in starts))
    return tuple(found)


def stacks_of(sites: Sequence[Site]) -> tuple[tuple[Site, ...], ...]:
    """The sites of each stack."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.stack, []).append(site)
    return tuple(map(tuple, found.values()))


def block_kinds(stack: Sequence[Site]) -> tuple[Kind, ...]:
    """What an ordinary block of a stack consists of, in the order in which it runs."""
    return KINDS if any(site.kind == "cross_attention" for site in stack) else _TWO


def _kept(mask: Mask, stack: Sequence[Site]) -> list[Site]:
    return [site for site in stack if mask.keep[site.index]]
