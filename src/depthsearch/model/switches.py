"""Masking: block views with sublayers left out, and a context manager that masks a whole model.

A view is a shallow copy of a block that shares its weights but has some children replaced; the
model itself is never edited, only its list of blocks is exchanged while `masked` is open.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from depthsearch.errors import MaskError
from depthsearch.model.anatomy import Anatomy
from depthsearch.model.families import FamilyRow
from depthsearch.space import Kind, Mask


class DroppedAttention(nn.Module):
    """An attention that adds nothing to the residual stream.

    Where there is a cache it writes a dummy entry `[batch, 1, tokens, 1]`, since the models read
    the sequence length off the cache of their first block.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        if past_key_values is not None:
            batch, tokens = hidden_states.shape[:2]
            dummy = hidden_states.new_zeros((batch, 1, tokens, 1))
            # That of an encoder-decoder is two, one for the tokens written and one for those read.
            cache = getattr(past_key_values, "self_attention_cache", past_key_values)
            cache.update(dummy, dummy, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class DroppedCrossAttention(nn.Module):
    """As `DroppedAttention`, for one that reads an encoder's output: no length is read off that."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return torch.zeros_like(hidden_states), None


class DroppedBiasedAttention(nn.Module):
    """As `DroppedAttention`, for one that also hands on a bias made from positions (T5).

    Where it is the first of its stack it makes that bias as `whole`, the attention in its place,
    would.
    """

    def __init__(self, layer_idx: int, whole: Any) -> None:
        super().__init__()
        self._dropped = DroppedAttention(layer_idx)
        self._bias: Any = whole.compute_bias
        self._has_bias = bool(whole.has_relative_attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_bias: Any = None,
        key_value_states: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        if key_value_states is not None:
            return torch.zeros_like(hidden_states), position_bias, None
        past = 0
        if past_key_values is not None:
            past = int(past_key_values.get_seq_length(self._dropped.layer_idx))
        zeros, _ = self._dropped(hidden_states, past_key_values=past_key_values)
        if position_bias is None and self._has_bias:
            tokens = hidden_states.shape[1]
            position_bias = self._bias(
                tokens, past + tokens, device=hidden_states.device, past_seen_tokens=past
            )
        return zeros, position_bias, None


class DroppedFFN(nn.Module):
    """An FFN that adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


def block_view(
    block: nn.Module,
    row: FamilyRow,
    index: int,
    *,
    attention: bool,
    ffn: bool,
    cross_attention: bool = True,
) -> nn.Module:
    """A copy of `block`, number `index` of its stack, that keeps only the sublayers asked for.

    It shares their weights. The norms of a dropped sublayer become identities, so it costs next to
    nothing. A block that has no cross-attention has none to keep.
    """
    gone: list[Kind] = []
    if not attention:
        gone.append("attention")
    if not cross_attention and row.cross_attention:
        gone.append("cross_attention")
    if not ffn:
        gone.append("ffn")
    if not gone:
        return block
    view = _shallow(block)
    identities = [*row.shared_norms] if len(gone) == len(row.kinds) else []
    for kind in gone:
        path = row.sublayer(kind)
        _put(view, path, _dropped(kind, row, index, block.get_submodule(path)))
        identities += [name for name in row.parts(kind) if name != path]
    for name in identities:
        _put(view, name, nn.Identity())
    return view


def without_norms(block: nn.Module, row: FamilyRow, kind: Kind) -> nn.Module:
    """A copy of `block` with identities for the norms of one sublayer, which itself stays."""
    view = _shallow(block)
    for name in row.norms(kind):
        _put(view, name, nn.Identity())
    return view


def through_view(
    block: nn.Module, inject: Tensor | None = None, row: FamilyRow | None = None
) -> nn.Module:
    """A stand-in for `block` that returns its input, or `inject` in its place.

    It is a shallow copy, so code that reads a block's attributes still finds them. Blocks whose
    `row` says that they hand on a bias from positions hand on the one that they are given.
    """
    view = _shallow(block)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if inject is None else inject

    def with_bias(
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_bias: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        encoder_decoder_position_bias: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        through = forward(hidden_states)
        return through, position_bias, encoder_decoder_position_bias

    view.forward = with_bias if row is not None and row.position_bias else forward
    return view


def _dropped(kind: Kind, row: FamilyRow, index: int, whole: nn.Module) -> nn.Module:
    """What takes the place of the sublayer `whole`."""
    if kind == "ffn":
        return DroppedFFN()
    if row.position_bias:
        return DroppedBiasedAttention(index, whole)
    return DroppedCrossAttention() if kind == "cross_attention" else DroppedAttention(index)


@contextmanager
def replaced_blocks(model: nn.Module, anatomy: Anatomy, views: list[nn.Module]) -> Iterator[None]:
    """Run the model with its blocks exchanged for `views`, and restore it, also on an error."""
    homes = [
        (blocks, str(index), block)
        for blocks in anatomy.module_lists(model)
        for index, block in enumerate(blocks)
    ]
    try:
        for (blocks, name, _), view in zip(homes, views, strict=True):
            blocks._modules[name] = view
        yield
    finally:
        for blocks, name, block in homes:
            blocks._modules[name] = block


@contextmanager
def masked(model: nn.Module, anatomy: Anatomy, mask: Mask) -> Iterator[nn.Module]:
    """The model with the dropped sublayers left out, for ordinary forward passes and generation.

    Restores the model on leaving, also on an error. Raises MaskError for a mask of wrong length.
    """
    if len(mask) != len(anatomy.sites):
        raise MaskError(
            f"the mask has {len(mask)} sites but the model has {len(anatomy.sites)}: "
            "it was made for another model"
        )
    views = []
    for index, block in enumerate(anatomy.block_list(model)):
        sites, row = anatomy.sites_of(index), anatomy.rows[index]
        kept = {site.kind: mask.keep[site.index] for site in sites}
        views.append(block_view(block, row, sites[0].block, **kept))
    with replaced_blocks(model, anatomy, views):
        yield model


def _shallow(block: nn.Module) -> nn.Module:
    view = copy.copy(block)
    view._modules = dict(block._modules)
    return view


def _put(view: nn.Module, path: str, module: nn.Module) -> None:
    """Set a module of a shallow copy, of whose parents on the way there copies are made too."""
    *parents, name = path.split(".")
    for parent in parents:
        child = view._modules[parent]
        assert child is not None
        view._modules[parent] = _shallow(child)
        view = cast(nn.Module, view._modules[parent])
    view._modules[name] = module
