"""Replaying the blocks of a model one sublayer at a time, outside its own forward.

One ordinary forward pass of a batch records the inputs that every block was called with (rotary
embeddings, attention masks). Blocks, or single sublayers of sequential blocks, can then be run on
any hidden state of that batch, bit for bit as the model itself would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from depthsearch.errors import UnsupportedModelError
from depthsearch.model.anatomy import Anatomy
from depthsearch.model.placement import block_devices, to_device
from depthsearch.model.switches import block_view, masked, replaced_blocks, through_view
from depthsearch.space import Mask


class Mode(StrEnum):
    """How finely a model can be replayed exactly."""

    SITE = "site"
    BLOCK = "block"
    WHOLE = "whole"


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of one block beside the hidden states."""


@dataclass(frozen=True)
class Recording:
    """One batch as the blocks see it: ids `[batch, seq]`, hidden states `[batch, seq, hidden]`.

    `first` enters block 0, `last` leaves the last block of the dense model, and `calls[i]` are the
    further arguments of block i.
    """

    ids: Tensor
    first: Tensor
    last: Tensor
    calls: tuple[Call, ...]


class Replayer:
    """Runs the blocks of one model; holds views that share its weights."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model = model
        self.anatomy = anatomy
        row = anatomy.stack.row
        self._devices = block_devices(anatomy.block_list(model))
        self._views: dict[tuple[int, bool, bool], nn.Module] = {
            (index, attention, ffn): block_view(block, row, index, attention=attention, ffn=ffn)
            for index, block in enumerate(anatomy.block_list(model))
            for attention, ffn in ((True, True), (True, False), (False, True))
        }

    @torch.no_grad()
    def record(self, ids: Tensor) -> Recording:
        """Run the dense model once on `ids` `[batch, seq]` and keep what its blocks were given."""
        last: list[Tensor] = []

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            last[:] = [_tensor(output)]

        hook = self.anatomy.block_list(self.model)[-1].register_forward_hook(after)
        try:
            first, calls = self._calls(ids)
        finally:
            hook.remove()
        return Recording(ids, first, last[0], calls)

    @torch.no_grad()
    def entry(self, ids: Tensor) -> tuple[Tensor, tuple[Call, ...]]:
        """What enters block 0 for `ids` `[batch, seq]`, and the further arguments of every block.

        As in `record`, but no block is run, so none needs its weights.
        """
        views = [through_view(block) for block in self.anatomy.block_list(self.model)]
        with replaced_blocks(self.model, self.anatomy, views):
            return self._calls(ids)

    def _calls(self, ids: Tensor) -> tuple[Tensor, tuple[Call, ...]]:
        """One forward pass, and what the blocks now in the model were called with."""
        calls: list[Call] = []
        states: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if not states:
                states.append(hidden)
            calls.append((tuple(args[1:]), kwargs))

        blocks = list(self.anatomy.block_list(self.model))
        # Before what moves them to the block's device, so that what blocks share is seen as such.
        hooks = [
            b.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for b in blocks
        ]
        try:
            self.body(ids)
        finally:
            for hook in hooks:
                hook.remove()
        if len(calls) != len(blocks):
            raise UnsupportedModelError(
                f"{self.anatomy.model_class} called {len(calls)} blocks of {len(blocks)} in one "
                "forward pass: its blocks cannot be replayed"
            )
        return states[0], self._at_blocks(calls)

    def _at_blocks(self, calls: Sequence[Call]) -> tuple[Call, ...]:
        """The arguments of each block on its device; one copy a device of what blocks share."""
        if len(set(self._devices)) == 1:
            return tuple(calls)
        seen: dict[torch.device, dict[int, Tensor]] = {device: {} for device in self._devices}
        return tuple(
            to_device(call, device, seen[device])
            for call, device in zip(calls, self._devices, strict=True)
        )

    def body(self, ids: Tensor) -> None:
        """One ordinary forward pass with the head at the last position only."""
        # The head is not needed for what blocks are given.
        model: Any = self.model
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    @torch.no_grad()
    def step(
        self, recording: Recording, block: int, hidden: Tensor, *, attention: bool, ffn: bool
    ) -> Tensor:
        """The hidden states `[batch, seq, hidden]` after one block with the sublayers asked for."""
        return self.apply(recording.calls[block], block, hidden, attention=attention, ffn=ffn)

    @torch.no_grad()
    def apply(
        self, call: Call, block: int, hidden: Tensor, *, attention: bool, ffn: bool
    ) -> Tensor:
        """As `step`, for a block whose further arguments are `call`."""
        if not attention and not ffn:
            return hidden
        args, kwargs = call
        return _tensor(self._views[block, attention, ffn](hidden, *args, **kwargs))

    @torch.no_grad()
    def whole(self, recording: Recording, mask: Mask) -> Tensor:
        """The hidden states after the last block of one ordinary masked forward pass."""
        states: list[Tensor] = []

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states[:] = [_tensor(output)]

        with masked(self.model, self.anatomy, mask):
            hook = self.anatomy.block_list(self.model)[-1].register_forward_hook(after)
            try:
                self.body(recording.ids)
            finally:
                hook.remove()
        return states[0]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[positions, vocab]` of hidden states `[positions, hidden]` after all blocks."""
        return self.head(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """As `logits`, but differentiable where gradients are enabled.

        Runs the model's own forward (final norm, scaling, head, soft-capping) with the blocks
        replaced by one that injects `hidden`; everything there works position by position.
        """
        model: Any = self.model
        blocks = self.anatomy.block_list(self.model)
        inject = hidden.unsqueeze(0)
        views = [through_view(blocks[0], inject), *(through_view(b) for b in list(blocks)[1:])]
        dummy = torch.zeros((1, hidden.shape[0]), dtype=torch.long, device=hidden.device)
        with replaced_blocks(self.model, self.anatomy, views):
            logits: Tensor = model(input_ids=dummy, use_cache=False).logits
        return logits[0]

    def states(self, recording: Recording) -> Sequence[Tensor]:
        """The dense residual stream before every site and after the last, `[batch, seq, hidden]`.

        All on one device. In a parallel block the stream before the FFN is the one with only the
        attention added.
        """
        hidden, found = recording.first, [recording.first]
        for block in range(self.anatomy.stack.blocks):
            found.append(self.step(recording, block, hidden, attention=True, ffn=False))
            hidden = self.step(recording, block, hidden, attention=True, ffn=True)
            found.append(hidden)
        return [state.to(recording.first.device) for state in found]


def _tensor(output: Any) -> Tensor:
    value = output[0] if isinstance(output, tuple) else output
    assert isinstance(value, Tensor)
    return value
