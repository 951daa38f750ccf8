"""Masks by position alone: the end, the beginning, every other block, the middle.

They know nothing of the model but its depth, which makes them the first thing to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from depthsearch.searchers.ranking import Unit, drop_in_order
from depthsearch.searchers.staged import Plan
from depthsearch.space import Batch, Mask, Proposal, SearchSpace

FIXED = "fixed"

Strategy = Literal["all", "top", "bottom", "odd", "even", "symmetric", "deepest_but_last"]


@dataclass(frozen=True)
class FixedOptions:
    """Which blocks go first; `all` proposes one mask of each strategy.

    Blocks are counted from 1 within their stack. `top` drops from the last block down, `bottom`
    from the first up; `odd` and `even` drop every other block from the last down, then the others;
    `symmetric` drops from the middle outwards ("On the Effect of Dropping Layers of Pre-trained
    Transformer Models", arXiv 2004.03844). `deepest_but_last` drops the window that ends right
    before the last block ("The Unreasonable Ineffectiveness of the Deeper Layers", arXiv
    2403.17887, section 4.4).
    """

    strategy: Strategy = "all"


def fixed_plan(space: SearchSpace, options: FixedOptions) -> Plan:
    """One batch with the mask of each strategy; strategies that agree share one proposal."""
    names = tuple(_FIRST) if options.strategy == "all" else (options.strategy,)
    found: dict[Mask, list[str]] = {}
    for name in names:
        found.setdefault(fixed_mask(space, name), []).append(name)
    yield Batch(
        tuple(Proposal(mask, f"{FIXED} {' and '.join(same)}") for mask, same in found.items())
    )


def fixed_mask(space: SearchSpace, strategy: str) -> Mask:
    """The mask on budget that one strategy, not `all`, leads to.

    Whole blocks are dropped in the strategy's order until the budget is met, single genes in a
    space of one kind of sublayer; then what fits is put back, last dropped first. Where whole
    blocks don't suffice (blocks protected in part), their free genes go in the same order.
    """
    places = block_places(space, strategy)

    def in_order(units: Sequence[Unit]) -> list[Unit]:
        return sorted(units, key=lambda unit: (places[_block(space, unit[0])], unit))

    genes = in_order(space.genes)
    rank = {gene: float(place) for place, gene in enumerate(genes)}
    units = genes if space.granularity in ("attention", "ffn") else in_order(_whole_blocks(space))
    return drop_in_order(space, units, [rank[gene] for gene in space.genes])


def block_places(space: SearchSpace, strategy: str) -> Mapping[tuple[str, int], tuple[float, int]]:
    """Where each block, as (stack, number), comes in the order of dropping; lowest goes first.

    Stacks take turns, each in proportion to its depth, so that all of them lose the same share.
    """
    stacks: dict[str, dict[int, None]] = {}
    for site in space.sites:
        stacks.setdefault(site.stack, {})[site.block] = None
    found: dict[tuple[str, int], tuple[float, int]] = {}
    for turn, (stack, blocks) in enumerate(stacks.items()):
        count = len(blocks)
        number = dict(enumerate(blocks, start=1))
        order = sorted(number, key=lambda n: (*_FIRST[strategy](n, count), -n))
        for place, n in enumerate(order):
            found[stack, number[n]] = ((place + 0.5) / count, turn)
    return found


_FIRST: Mapping[str, Callable[[int, int], tuple[float, ...]]] = MappingProxyType(
    {
        "top": lambda n, count: (count - n,),
        "bottom": lambda n, count: (n,),
        "odd": lambda n, count: (n % 2 == 0, count - n),
        "even": lambda n, count: (n % 2 == 1, count - n),
        "symmetric": lambda n, count: (abs(2 * n - count - 1),),
        "deepest_but_last": lambda n, count: (n == count, count - n),
    }
)
"""By strategy: the sort key of block `n` of `count`, lowest dropped first; deeper breaks ties."""


def _whole_blocks(space: SearchSpace) -> list[Unit]:
    blocks: dict[tuple[str, int], list[int]] = {}
    for site in space.sites:
        blocks.setdefault(_block(space, site.index), []).append(site.index)
    return [tuple(block) for block in blocks.values() if space.free.issuperset(block)]


def _block(space: SearchSpace, index: int) -> tuple[str, int]:
    site = space.sites[index]
    return site.stack, site.block
