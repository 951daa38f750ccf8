"""Truncation: what a packable mask keeps, as an ordinary checkpoint of the same family.

New block k takes its attention (with its norms) from block i and its FFN (with its norms) from
block j of the dense model, `plan.pairs[k] == (i, j)`. The blocks of a decoder that reads an
encoder's output have three parts that may come from three blocks. Nothing here copies a tensor or
changes the dense model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from depthsearch.errors import ExportError, MaskError
from depthsearch.model.anatomy import Anatomy, Stack
from depthsearch.model.families import FamilyRow
from depthsearch.space import Kind, Mask, Site, is_packable
from depthsearch.space.packing import block_kinds, interruption, new_blocks, stacks_of

KIND_NAMES: dict[Kind, str] = {
    "attention": "attention",
    "cross_attention": "cross-attention",
    "ffn": "FFN",
}

_BIAS = "relative_attention_bias"
"""The table in a stack's first attention that all its attentions take their bias from."""


@dataclass(frozen=True)
class NativePlan:
    """The blocks of the small model, each `(block of its attention, block of its FFN)`.

    In a decoder that reads an encoder's output the block of the cross-attention is between the two.
    With two stacks the encoder's blocks come first, `encoder_blocks` new ones of
    `dense_encoder_blocks`, and all numbers count within their stack.
    """

    pairs: tuple[tuple[int, ...], ...]
    dense_blocks: int
    encoder_blocks: int = 0
    dense_encoder_blocks: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether every block stays where it is."""
        return all(
            len(stack.pairs) == stack.dense_blocks
            and all(set(sources) == {new} for new, sources in enumerate(stack.pairs))
            for stack in self.stacks
        )

    @property
    def stacks(self) -> tuple[NativePlan, ...]:
        """A plan for each stack, the encoder's first; this one where it has but one."""
        if not self.dense_encoder_blocks:
            return (self,)
        cut, dense = self.encoder_blocks, self.dense_encoder_blocks
        return (
            NativePlan(self.pairs[:cut], dense),
            NativePlan(self.pairs[cut:], self.dense_blocks - dense),
        )


def plan_native(anatomy: Anatomy, mask: Mask) -> NativePlan:
    """How the kept sublayers form ordinary blocks.

    Raises ExportError, with the reason, for a mask that ordinary blocks can't express, and
    MaskError for a mask made for another model.
    """
    sites = anatomy.sites
    if len(mask) != len(sites):
        raise MaskError(
            f"the mask has {len(mask)} sites but the model has {len(sites)}: it was made for "
            "another model"
        )
    _refuse_empty_stacks(mask, sites)
    if anatomy.rows[0].parallel:
        _refuse_halves(anatomy, mask)
    if not is_packable(mask, sites):
        why = _odd_run(mask, sites) if len(anatomy.stacks) == 1 else _broken_order(mask, sites)
        raise ExportError(why)
    stacks = new_blocks(mask, sites)
    return NativePlan(
        tuple(block for stack in stacks for block in stack),
        len(anatomy.rows),
        len(stacks[0]) if anatomy.encoder_blocks else 0,
        anatomy.encoder_blocks,
    )


def truncated_state(model: nn.Module, anatomy: Anatomy, plan: NativePlan) -> dict[str, Tensor]:
    """The weights of the small model under its own names, sharing memory with the dense model's.

    Of tied weights only the one that `save_pretrained` writes is listed. Raises ExportError where
    a re-paired block holds weights that belong to none of its sublayers.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state: dict[str, Tensor] = {}
    weights: dict[str, dict[int, list[tuple[str, Tensor]]]] = {s.path: {} for s in anatomy.stacks}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        stack = next((s for s in anatomy.stacks if name.startswith(f"{s.path}.")), None)
        if stack is None or _stays_in_place(name, stack):
            state[name] = tensor
            continue
        number, _, inner = name.removeprefix(f"{stack.path}.").partition(".")
        weights[stack.path].setdefault(int(number), []).append((inner, tensor))
    for stack, part in zip(anatomy.stacks, plan.stacks, strict=True):
        for new, sources in enumerate(part.pairs):
            by_block = [weights[stack.path][source] for source in sources]
            outside = _outside(stack.row, by_block[0])
            if len(set(sources)) > 1 and outside:
                raise ExportError(
                    f"{anatomy.model_class}: block {sources[0]} holds '{outside[0][0]}' outside "
                    "its attention, FFN and norms, so its sublayers can't be re-paired; drop whole "
                    "blocks only"
                )
            for inner, tensor in (*outside, *_of_sublayers(stack.row, by_block)):
                state[f"{stack.path}.{new}.{inner}"] = tensor
    return state


def _of_sublayers(
    row: FamilyRow, by_block: Sequence[list[tuple[str, Tensor]]]
) -> Iterator[tuple[str, Tensor]]:
    """The weights of each sublayer of a new block, from the dense block at the same place."""
    for kind, weights in zip(row.kinds, by_block, strict=True):
        yield from (entry for entry in weights if _belongs(entry[0], row.parts(kind)))


def _outside(row: FamilyRow, weights: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The weights of a dense block that belong to no sublayer alone."""
    parts = [part for kind in row.kinds for part in row.parts(kind)]
    return [entry for entry in weights if not _belongs(entry[0], parts)]


def _belongs(name: str, parts: Sequence[str]) -> bool:
    return any(name.startswith(f"{part}.") for part in parts)


def _stays_in_place(name: str, stack: Stack) -> bool:
    """Whether a weight in block 0 is the whole stack's, whichever attention block 0 gets."""
    table = f"{stack.path}.0.{stack.row.attention}.{_BIAS}."
    return stack.row.position_bias and name.startswith(table)


def _refuse_empty_stacks(mask: Mask, sites: Sequence[Site]) -> None:
    if not mask.kept:
        raise ExportError("the mask drops every block: keep at least one to export a model")
    for stack in stacks_of(sites):
        if not any(mask.keep[site.index] for site in stack):
            raise ExportError(
                f"the mask drops every block of the {stack[0].stack}: keep at least one of each "
                "stack to export a model"
            )


def _refuse_halves(anatomy: Anatomy, mask: Mask) -> None:
    """Refuse masks that split a parallel block."""
    for block in range(len(anatomy.rows)):
        attention, ffn = anatomy.sites_of(block)
        if mask.keep[attention.index] != mask.keep[ffn.index]:
            gone = ffn if mask.keep[attention.index] else attention
            raise ExportError(
                f"{anatomy.model_class} runs attention and FFN of a block side by side, so a "
                f"native export drops whole blocks only, but the mask drops {gone.name} alone; "
                "search with 'granularity: block'"
            )


def _odd_run(mask: Mask, sites: Sequence[Site]) -> str:
    start, stop = next(run for run in mask.runs if (run[1] - run[0]) % 2)
    run = (
        f"{sites[start].name} alone"
        if stop - start == 1
        else f"{stop - start} neighbouring sublayers, {sites[start].name} to "
        f"{sites[stop - 1].name}, an odd number"
    )
    return (
        "a native export needs what is kept to alternate attention and FFN, but the mask drops "
        f"{run}; search with 'packable: true' (free sublayer masks need another format, which "
        "is not available yet)"
    )


def _broken_order(mask: Mask, sites: Sequence[Site]) -> str:
    found = interruption(mask, sites)
    assert found is not None
    last, following = found
    if last is None:
        assert following is not None
        kept, stack = f"begins with {following.name}", following.stack
    elif following is None:
        kept, stack = f"ends with {last.name}", last.stack
    else:
        kept, stack = f"goes from {last.name} to {following.name}", last.stack
    kinds = block_kinds([site for site in sites if site.stack == stack])
    turns = ", ".join(KIND_NAMES[kind] for kind in kinds)
    return (
        f"a native export needs what is kept of the {stack} to be {turns} in turn, but it {kept}; "
        "search with 'granularity: block' (free sublayer masks need another format, which is not "
        "available yet)"
    )
