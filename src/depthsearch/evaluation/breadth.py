"""Hidden states on their way through the blocks, all of them one block at a time.

What waits lies in the machine's own memory; what is worked on is brought to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from depthsearch.evaluation.accounting import width
from depthsearch.evaluation.prefix import PrefixWalk
from depthsearch.evaluation.samples import Sample
from depthsearch.evaluation.turns import Turn, steps_of
from depthsearch.model.placement import to_device
from depthsearch.model.replay import Call, Mode, Replayer
from depthsearch.space import Mask

Flags = tuple[bool, ...]

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Entry:
    """What enters block 0 of one batch `[batch, seq, hidden]`, and all blocks' other arguments."""

    sample: Sample
    first: Tensor
    calls: tuple[Call, ...]

    @classmethod
    def of(cls, sample: Sample, first: Tensor, calls: tuple[Call, ...]) -> Entry:
        """Bring it to the machine's memory; what the blocks share stays shared."""
        return cls(sample, first.to(_HOST), to_device(calls, _HOST))

    @property
    def device(self) -> torch.device:
        """Where it is worked on."""
        return self.sample.ids.device

    def call(self, block: int) -> Call:
        """The further arguments of one block, on the device."""
        call: Call = to_device(self.calls[block], self.device)
        return call


class Traveller(Protocol):
    """Hidden states that go through the blocks in order."""

    def needs(self, block: int) -> bool:
        """Whether `advance` runs anything of this block."""
        ...

    def advance(self, block: int) -> None:
        """Move everything through one block, whose weights are there if they are needed."""
        ...


class Prefixes:
    """The states of every distinct prefix of `masks`, on the batches of `entries`.

    `leaves[batch][mask]` are, in the end, the hidden states `[sequence * count, hidden]` at the
    positions looked at.
    """

    def __init__(
        self, replayer: Replayer, mode: Mode, masks: Sequence[Mask], entries: Sequence[Entry]
    ) -> None:
        self._replayer = replayer
        self._steps = steps_of(2, width(mode))
        self._masks = masks
        self._entries = entries
        self._last = replayer.anatomy.stack.blocks - 1
        self._waiting: list[dict[Flags, Tensor]] = [{(): entry.first} for entry in entries]
        self.leaves: list[dict[Mask, Tensor]] = [{} for _ in entries]

    def needs(self, block: int) -> bool:
        """Whether a mask keeps anything of the block."""
        return any(any(mask.keep[2 * block : 2 * block + 2]) for mask in self._masks)

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Move the states of every batch through one block."""
        # What masks keep of this block, by what they keep of all before it.
        branches: dict[Flags, dict[Mask, None]] = {}
        for mask in self._masks:
            kept = Mask(mask.keep[2 * block : 2 * block + 2])
            branches.setdefault(mask.keep[: 2 * block], {})[kept] = None
        for place, entry in enumerate(self._entries):
            call, waiting = entry.call(block), self._waiting[place]
            after: dict[Flags, Tensor] = {}
            for prefix, kinds in branches.items():
                # Taken out, so that a state nobody returns to is freed.
                here = waiting.pop(prefix).to(entry.device)
                for kept, hidden in self._beyond(block, call, list(kinds), here):
                    if block == self._last:
                        hidden = entry.sample.at(hidden)
                    after[prefix + kept.keep] = hidden.to(_HOST)
                    del hidden
            self._waiting[place] = after
            if block == self._last:
                self.leaves[place] = {mask: after[mask.keep] for mask in self._masks}

    def _beyond(
        self, block: int, call: Call, kinds: Sequence[Mask], here: Tensor
    ) -> list[tuple[Mask, Tensor]]:
        """One state behind the block for each of `kinds`, masks of its two sites."""
        found: list[tuple[Mask, Tensor]] = []

        def advance(step: int, turn: Turn, hidden: Tensor) -> Tensor:
            kept = turn.kept
            attention, ffn = (step == 0, step == 1) if len(kept) == 1 else kept
            return self._replayer.apply(call, block, hidden, attention=attention, ffn=ffn)

        def leaf(place: int, hidden: Tensor) -> None:
            found.append((kinds[place], hidden))

        PrefixWalk(self._steps, advance).run(kinds, here, leaf)
        return found


class DensePath:
    """The dense model's states; `leaves[batch]` are those at the positions looked at."""

    def __init__(self, replayer: Replayer, entries: Sequence[Entry]) -> None:
        self._replayer = replayer
        self._entries = entries
        self._last = replayer.anatomy.stack.blocks - 1
        self._states = [entry.first for entry in entries]
        self.leaves: list[Tensor] = []

    def needs(self, block: int) -> bool:
        """Every block is needed."""
        return True

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Move every batch through one whole block."""
        for place, entry in enumerate(self._entries):
            here, call = self._states[place].to(entry.device), entry.call(block)
            here = self._replayer.apply(call, block, here, attention=True, ffn=True)
            if block == self._last:
                self.leaves.append(entry.sample.at(here).to(_HOST))
            else:
                self._states[place] = here.to(_HOST)


class DenseStream:
    """The dense residual stream of each batch: `states[batch]` as from `Replayer.states`."""

    def __init__(self, replayer: Replayer, entries: Sequence[Entry]) -> None:
        self._replayer = replayer
        self._entries = entries
        self.states = [[entry.first] for entry in entries]

    def needs(self, block: int) -> bool:
        """Every block is needed."""
        return True

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Add the states inside and behind one block."""
        for states, entry in zip(self.states, self._entries, strict=True):
            here, call = states[-1].to(entry.device), entry.call(block)
            for ffn in (False, True):
                after = self._replayer.apply(call, block, here, attention=True, ffn=ffn)
                states.append(after.to(_HOST))
