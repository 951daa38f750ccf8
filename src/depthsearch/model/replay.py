"""Replaying the blocks of a model one sublayer at a time, outside its own forward.

One ordinary forward pass of a batch records the inputs that every block was called with (rotary
embeddings, attention masks). Blocks, or single sublayers of sequential blocks, can then be run on
any hidden state of that batch, bit for bit as the model itself would.

An encoder-decoder has two streams, over the tokens that it reads and over those that it writes. A
row of its ids is both, one after the other and equally long, and so is its hidden state `[batch,
seq, hidden]`: the encoder's blocks change the first half of it, the decoder's the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from inspect import signature
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from depthsearch.errors import UnsupportedModelError
from depthsearch.model.anatomy import Anatomy
from depthsearch.model.families import ENCODER_DECODERS
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
        blocks = anatomy.block_list(model)
        self._devices = block_devices(blocks)
        self._views: dict[tuple[int, tuple[bool, bool, bool]], nn.Module] = {
            (index, (attention, cross, ffn)): block_view(
                block,
                anatomy.rows[index],
                anatomy.sites_of(index)[0].block,
                attention=attention,
                cross_attention=cross,
                ffn=ffn,
            )
            for index, block in enumerate(blocks)
            for attention, cross, ffn in product((True, False), repeat=3)
        }

    @property
    def pad(self) -> int | None:
        """The token of an encoder-decoder that stands for nothing, None for other models."""
        if not self.anatomy.encoder_blocks:
            return None
        pad = getattr(self.model, "config").pad_token_id
        if pad is None:
            raise UnsupportedModelError(
                f"{self.anatomy.model_class}: its config names no pad_token_id, which texts of "
                "unequal length need: add it to config.json"
            )
        return int(pad)

    def seen(self, ids: Tensor) -> Tensor | None:
        """Which of `ids` `[batch, seq]` are more than padding, None where all are.

        The first token that a decoder is given counts, whatever it is.
        """
        if self.pad is None:
            return None
        half = ids.shape[1] // 2
        found: Tensor = ids != self.pad
        found[:, half] = True
        return found

    def seen_by_stack(self, ids: Tensor) -> tuple[Tensor | None, ...]:
        """For each stack which of `ids` `[batch, seq]` it works on and are more than padding."""
        seen = self.seen(ids)
        if seen is None:
            return (None,)
        half = ids.shape[1] // 2
        read, written = seen.clone(), seen.clone()
        read[:, half:], written[:, :half] = False, False
        return read, written

    def half(self, joint: Tensor, block: int) -> Tensor:
        """The part of `[batch, seq, ...]` that a block works on: all but for encoder-decoders."""
        if not self.anatomy.encoder_blocks:
            return joint
        return _halves(joint)[block >= self.anatomy.encoder_blocks]

    @torch.no_grad()
    def record(self, ids: Tensor) -> Recording:
        """Run the dense model once on `ids` `[batch, seq]` and keep what its blocks were given."""
        with self._lasts() as last:
            first, calls = self._calls(ids)
        return Recording(ids, first, torch.cat(last, dim=1) if len(last) > 1 else last[0], calls)

    @contextmanager
    def _lasts(self) -> Iterator[list[Tensor]]:
        """What leaves the last block of each stack in forward passes while the context is open."""
        lists = self.anatomy.module_lists(self.model)
        found: dict[int, Tensor] = {}
        last: list[Tensor] = []

        def after(stack: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
            def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                found[stack] = _tensor(output)
                last[:] = [found[place] for place in sorted(found)]

            return hook

        hooks = [
            blocks[-1].register_forward_hook(after(place)) for place, blocks in enumerate(lists)
        ]
        try:
            yield last
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def entry(self, ids: Tensor) -> tuple[Tensor, tuple[Call, ...]]:
        """What enters block 0 for `ids` `[batch, seq]`, and the further arguments of every block.

        As in `record`, but no block of a decoder-only model is run, so none needs its weights.
        """
        if self.anatomy.encoder_blocks:
            return self._calls(ids)
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
            if len(calls) in starts:
                states.append(hidden)
            calls.append((tuple(args[1:]), kwargs))

        blocks = list(self.anatomy.block_list(self.model))
        starts = {0, self.anatomy.encoder_blocks}
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
        if len(states) == 1:
            return states[0], self._at_blocks(calls)
        named = [_by_name(block, call) for block, call in zip(blocks, calls, strict=True)]
        return torch.cat(states, dim=1), self._at_blocks(named)

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
        if not self.anatomy.encoder_blocks:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            return

        def shorten(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][:, -1:], *args[1:])

        read, written = _halves(ids)
        seen = self.seen(ids)
        assert seen is not None
        hook = model.get_output_embeddings().register_forward_pre_hook(shorten)
        try:
            model(
                input_ids=read,
                attention_mask=_halves(seen)[0].long(),
                decoder_input_ids=written,
                use_cache=False,
            )
        finally:
            hook.remove()

    @torch.no_grad()
    def step(
        self,
        recording: Recording,
        block: int,
        hidden: Tensor,
        *,
        attention: bool,
        ffn: bool,
        cross_attention: bool = False,
    ) -> Tensor:
        """The hidden states `[batch, seq, hidden]` after one block with the sublayers asked for."""
        kept = {"attention": attention, "cross_attention": cross_attention, "ffn": ffn}
        return self.apply(recording.calls[block], block, hidden, **kept)

    @torch.no_grad()
    def apply(
        self,
        call: Call,
        block: int,
        hidden: Tensor,
        *,
        attention: bool,
        ffn: bool,
        cross_attention: bool = False,
    ) -> Tensor:
        """As `step`, for a block whose further arguments are `call`."""
        return self._applied(call, block, hidden, (attention, cross_attention, ffn))

    def _applied(
        self, call: Call, block: int, hidden: Tensor, kept: tuple[bool, bool, bool]
    ) -> Tensor:
        """As `apply`, but differentiable; `kept` are attention, cross-attention and FFN."""
        if not any(kept):
            return hidden
        args, kwargs = call
        cross_attention = kept[1]
        view = self._views[block, kept]
        if not self.anatomy.encoder_blocks:
            return _tensor(view(hidden, *args, **kwargs))
        read, written = _halves(hidden)
        if block < self.anatomy.encoder_blocks:
            read = _tensor(view(read, **kwargs))
        else:
            # Nothing but cross-attention looks at what was read.
            encoded = self._encoded(read) if cross_attention else kwargs["encoder_hidden_states"]
            written = _tensor(view(written, **{**kwargs, "encoder_hidden_states": encoded}))
        return torch.cat([read, written], dim=1)

    def _encoded(self, read: Tensor) -> Tensor:
        """What the decoder sees of the encoder's stream `[batch, seq, hidden]`."""
        norm = ENCODER_DECODERS[self.anatomy.model_type].encoder_norm
        return read if norm is None else _tensor(self.model.get_submodule(norm)(read))

    @torch.no_grad()
    def run(
        self, calls: tuple[Call, ...], sites: Sequence[int], kept: Sequence[bool], hidden: Tensor
    ) -> Tensor:
        """The hidden states after `sites`, all of one block, with those that are `kept`."""
        return self.through(calls, sites, kept, hidden)

    def through(
        self, calls: tuple[Call, ...], sites: Sequence[int], kept: Sequence[bool], hidden: Tensor
    ) -> Tensor:
        """As `run`, but differentiable where gradients are enabled."""
        found = [self.anatomy.sites[site] for site in sites]
        flags: dict[str, bool] = {s.kind: flag for s, flag in zip(found, kept, strict=True)}
        attention, cross_attention, ffn = (
            flags.get(kind, False) for kind in ("attention", "cross_attention", "ffn")
        )
        block = self.anatomy.block_of(found[0])
        return self._applied(calls[block], block, hidden, (attention, cross_attention, ffn))

    @torch.no_grad()
    def whole(self, recording: Recording, mask: Mask) -> Tensor:
        """The hidden states after the last block of one ordinary masked forward pass."""
        with masked(self.model, self.anatomy, mask), self._lasts() as last:
            self.body(recording.ids)
        return torch.cat(last, dim=1) if len(last) > 1 else last[0]

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
        if self.anatomy.encoder_blocks:
            return self._decoder_head(hidden)
        # A sequence of one token each: they are more than a table of learned positions may hold.
        inject = hidden.unsqueeze(1)
        views = [through_view(blocks[0], inject), *(through_view(b) for b in list(blocks)[1:])]
        ids = torch.zeros((len(hidden), 1), dtype=torch.long, device=hidden.device)
        with replaced_blocks(self.model, self.anatomy, views):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits[:, 0]

    def _decoder_head(self, hidden: Tensor) -> Tensor:
        model: Any = self.model
        # A sequence of one token each, since decoders add a position to what they are given.
        inject = hidden.unsqueeze(1)
        ids = torch.zeros((len(hidden), 1), dtype=torch.long, device=hidden.device)
        first = self.anatomy.encoder_blocks
        views = [
            through_view(block, inject if place == first else None, row)
            for place, (block, row) in enumerate(
                zip(self.anatomy.block_list(model), self.anatomy.rows, strict=True)
            )
        ]
        with replaced_blocks(model, self.anatomy, views):
            logits: Tensor = model(
                encoder_outputs=(inject.detach(),), decoder_input_ids=ids, use_cache=False
            ).logits
        return logits[:, 0]

    def states(self, recording: Recording) -> Sequence[Tensor]:
        """The dense residual stream before every site and after the last, `[batch, seq, hidden]`.

        All on one device. In a parallel block the stream before the FFN is the one with only the
        attention added.
        """
        hidden, found = recording.first, [recording.first]
        if self.anatomy.encoder_blocks:
            for site in self.anatomy.sites:
                hidden = self.run(recording.calls, (site.index,), (True,), hidden)
                found.append(hidden)
            return [state.to(recording.first.device) for state in found]
        for block in range(self.anatomy.stack.blocks):
            found.append(self.step(recording, block, hidden, attention=True, ffn=False))
            hidden = self.step(recording, block, hidden, attention=True, ffn=True)
            found.append(hidden)
        return [state.to(recording.first.device) for state in found]


def _halves(joint: Tensor) -> tuple[Tensor, Tensor]:
    """What an encoder reads and what its decoder writes, of `[batch, seq, ...]`."""
    half = joint.shape[1] // 2
    # Copies lie in memory as the model's own do, so that products round alike.
    return joint[:, :half].contiguous(), joint[:, half:].contiguous()


def _by_name(block: nn.Module, call: Call) -> Call:
    """The further arguments of a block by name."""
    args, kwargs = call
    bound = signature(block.forward).bind(None, *args, **kwargs).arguments
    named = {
        name: value for name, value in bound.items() if name not in ("hidden_states", "kwargs")
    }
    return (), named | bound.get("kwargs", {})


def _tensor(output: Any) -> Tensor:
    value = output[0] if isinstance(output, tuple) else output
    assert isinstance(value, Tensor)
    return value
