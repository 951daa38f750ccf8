"""Packability: can the kept sublayers be re-paired into ordinary blocks?

A stock checkpoint is a list of blocks, each attention then FFN. What a mask keeps can be stored
that way, without custom code, exactly when it still alternates attention, FFN, attention, FFN.
Since the dense sequence alternates, that holds exactly when every run of dropped sites is even.
"""

from __future__ import annotations

from collections.abc import Sequence

from depthsearch.errors import MaskError
from depthsearch.space.mask import Mask
from depthsearch.space.site import Site


def is_packable(mask: Mask, sites: Sequence[Site]) -> bool:
    """Whether the kept sites of every stack alternate attention, FFN, attention, FFN."""
    stacks = dict.fromkeys(site.stack for site in sites)
    for stack in stacks:
        kinds = [site.kind for site in sites if site.stack == stack and mask.keep[site.index]]
        if len(kinds) % 2 or any(
            kind != ("attention", "ffn")[place % 2] for place, kind in enumerate(kinds)
        ):
            return False
    return True


def pairing(mask: Mask, sites: Sequence[Site]) -> tuple[tuple[int, int], ...]:
    """The new blocks as `(block of the attention, block of the FFN)`, in order.

    Raises MaskError where the mask is not packable or the model has several stacks.
    """
    if len({site.stack for site in sites}) != 1:
        raise MaskError("only models with a single stack of blocks can be re-paired")
    if not is_packable(mask, sites):
        odd = [run for run in mask.runs if (run[1] - run[0]) % 2]
        if not odd:
            raise MaskError("the model does not alternate attention and FFN: it can't be re-paired")
        start, stop = odd[0]
        raise MaskError(
            f"the mask cannot be re-paired into ordinary blocks: it drops {stop - start} "
            f"neighbouring sublayers from {sites[start].name} to {sites[stop - 1].name}, "
            "an odd number; search with 'packable: true' to get masks that can"
        )
    kept = [sites[i] for i in mask.kept]
    return tuple((a.block, f.block) for a, f in zip(kept[::2], kept[1::2], strict=True))
