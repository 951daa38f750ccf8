"""Masking: block views with sublayers left out, and a context manager that masks a whole model.

A view is a shallow copy of a block that shares its weights but has some children replaced; the
model itself is never edited, only its list of blocks is exchanged while `masked` is open.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from depthsearch.errors import MaskError
from depthsearch.model.anatomy import Anatomy
from depthsearch.model.families import FamilyRow
from depthsearch.space import Mask


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
    ) -> tuple[Tensor, None]:
        if past_key_values is not None:
            batch, tokens = hidden_states.shape[:2]
            dummy = hidden_states.new_zeros((batch, 1, tokens, 1))
            past_key_values.update(dummy, dummy, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class DroppedFFN(nn.Module):
    """An FFN that adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


def block_view(
    block: nn.Module, row: FamilyRow, index: int, *, attention: bool, ffn: bool
) -> nn.Module:
    """A copy of `block` that shares its weights and keeps only the sublayers asked for.

    The norms of a dropped sublayer become identities, so it costs next to nothing.
    """
    if attention and ffn:
        return block
    view = _shallow(block)
    gone: list[str] = []
    if not attention:
        view._modules[row.attention] = DroppedAttention(index)
        gone += row.attention_norms
    if not ffn:
        view._modules[row.ffn] = DroppedFFN()
        gone += row.ffn_norms
    if not attention and not ffn:
        gone += row.shared_norms
    for name in gone:
        view._modules[name] = nn.Identity()
    return view


def through_view(block: nn.Module, inject: Tensor | None = None) -> nn.Module:
    """A stand-in for `block` that returns its input, or `inject` in its place.

    It is a shallow copy, so code that reads a block's attributes still finds them.
    """
    view = _shallow(block)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if inject is None else inject

    view.forward = forward
    return view


@contextmanager
def replaced_blocks(model: nn.Module, anatomy: Anatomy, views: list[nn.Module]) -> Iterator[None]:
    """Run the model with its blocks exchanged for `views`, and restore it, also on an error."""
    blocks = anatomy.block_list(model)
    originals = list(blocks)
    try:
        for index, view in enumerate(views):
            blocks._modules[str(index)] = view
        yield
    finally:
        for index, block in enumerate(originals):
            blocks._modules[str(index)] = block


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
        attention, ffn = anatomy.sites_of(index)
        views.append(
            block_view(
                block,
                anatomy.stack.row,
                index,
                attention=mask.keep[attention.index],
                ffn=mask.keep[ffn.index],
            )
        )
    with replaced_blocks(model, anatomy, views):
        yield model


def _shallow(block: nn.Module) -> nn.Module:
    view = copy.copy(block)
    view._modules = dict(block._modules)
    return view
