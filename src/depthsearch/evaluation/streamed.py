"""The streamed backend: breadth first through a model that the device can't hold.

Each block's weights are brought to the device once, and every hidden state that waits before the
block is moved through it: one for every distinct prefix of the masks, of every batch. A whole set
of masks on all batches costs one pass over the weights. Losses are those of `InProcess`, bit for
bit. Hidden states wait in the machine's own memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from depthsearch.calibration.objectives import Objective, figures
from depthsearch.errors import DataError, ModelError
from depthsearch.evaluation.accounting import Accounting
from depthsearch.evaluation.ahead import Ahead, Found
from depthsearch.evaluation.backend import UnitResult
from depthsearch.evaluation.breadth import DensePath, DenseStream, Entry, Prefixes, Traveller
from depthsearch.evaluation.samples import draw_samples, is_out_of_memory, joined, unit_result
from depthsearch.evaluation.similarity import HINT_BATCHES, Similarities
from depthsearch.model.replay import Mode, Replayer
from depthsearch.model.streaming import StreamedModel
from depthsearch.space import Hints, Mask, Sensitivity, Status

Losses = Callable[[Sequence[Tensor], Tensor, Tensor], Sequence[Tensor]]


class Streamed:
    """Evaluates masks on windows `[sequence, window]` cut into batches of `batch_tokens`.

    Arguments as for `InProcess`, besides `host_bytes`: how much memory the hidden states of masks
    may take while they wait (None: no limit). Where a set of masks needs more, contiguous runs of
    the sorted set are processed one after the other, each in a pass of its own over the weights;
    `passes` says how many. On top of the limit are kept what enters block 0 of every batch, the
    arguments that all blocks share, and the dense model's hidden states at the positions looked at.

    The first pass of a batch also carries the dense model's own hidden states, and before the first
    of all the embeddings are read, once. Raises DataError for windows that can't be used or a limit
    that not even one mask meets, ModelError for a model that only whole forward passes replay
    exactly.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        windows: Tensor,
        objective: Objective,
        *,
        mode: Mode,
        batch_tokens: int = 1024,
        positions: float = 0.25,
        seed: int = 0,
        host_bytes: int | None = None,
    ) -> None:
        if mode is Mode.WHOLE:
            raise ModelError(
                f"{streamed.anatomy.model_class}: its blocks can't be replayed on their own, so "
                "its weights can't be streamed block by block; evaluate it in-process"
            )
        self._samples = draw_samples(windows, batch_tokens, positions, seed, streamed.device)
        self._streamed = streamed
        self._replayer = Replayer(streamed.model, streamed.anatomy)
        self._objective = objective
        self._mode = mode
        self._blocks = streamed.anatomy.stack.blocks
        self._accounting = Accounting.of(
            streamed.model,
            streamed.anatomy,
            window_tokens=windows.shape[1],
            looked_at=self._samples[0].positions.shape[1],
            needs_teacher=objective.needs_teacher,
            mode=mode,
        )
        self._host_bytes = host_bytes
        self._entries: tuple[Entry, ...] = ()
        self._teacher: dict[int, Tensor] = {}
        self._passes = 0
        self._ahead = Ahead(self._compute)
        needed = self._waiting_bytes([Mask.dense(2 * self._blocks)], range(len(self._samples)))
        if host_bytes is not None and host_bytes < needed:
            raise DataError(
                f"host_bytes is {host_bytes:,}, but the hidden states of one mask beside the dense "
                f"model take {needed:,} bytes on {windows.numel():,} tokens; raise it, or use less "
                "calibration text"
            )

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences in each batch."""
        return tuple(int(sample.ids.shape[0]) for sample in self._samples)

    @property
    def window_tokens(self) -> int:
        """Tokens of one sequence."""
        return self._accounting.window_tokens

    @property
    def preparation(self) -> float:
        """The `cost_tokens` of the dense path that is recorded along with the first pass."""
        return self._accounting.preparation(sum(self.sequences))

    @property
    def passes(self) -> int:
        """Passes over the weights that the last `run`, `run_all`, `figures` or `hints` took.

        Blocks that no mask of a pass keeps anything of are not read in it.
        """
        return self._passes

    def run(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int] = (), *, sure: bool = True
    ) -> UnitResult:
        """Compute one unit, and in the same pass over the weights those that lie ahead.

        They are kept until another set of masks is asked for, so a race over many batches takes
        one pass; what it ends early is computed, but not counted.
        """
        return self._ahead.unit(batch, masks, ahead, self.unit_cost(batch, masks))

    def _compute(self, batches: Sequence[int], masks: Sequence[Mask]) -> Found:
        self._passes = 0
        return {
            (place, mask): (losses, status)
            for place, unit in zip(batches, self._units(batches, masks), strict=True)
            for mask, losses, status in zip(masks, unit.losses, unit.statuses, strict=True)
        }

    def run_all(
        self, masks: Sequence[Mask], batches: Sequence[int] | None = None
    ) -> list[UnitResult]:
        """Compute the units of `batches` (None: all) in one pass over the weights.

        More passes where `host_bytes` asks for them. Results are those of `run` for each batch.
        `cost_tokens` are a function of the set of masks: what several passes compute again is not
        charged. Out of memory splits the set, down to a single quarantined mask.
        """
        self._passes = 0
        return self._units(range(len(self._samples)) if batches is None else batches, masks)

    def plan(self, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of evaluating `masks` on every batch, nothing computed."""
        return self._accounting.plan(masks, self.sequences)

    def unit_cost(self, batch: int, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of one unit with nothing split or failing, nothing computed."""
        return self._accounting.plan(masks, self.sequences[batch : batch + 1])

    def figures(
        self, masks: Sequence[Mask], on_batch: Callable[[int, int], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """KL divergence and cross-entropy, each `[mask, sequence]` in float64, on every batch.

        For reporting, as `InProcess.figures`; `on_batch` is called when the heads are run.
        """

        def both(students: Sequence[Tensor], teacher: Tensor, targets: Tensor) -> Sequence[Tensor]:
            return figures(self._logits, students, teacher, targets)

        self._passes = 0
        parts = self._losses(range(len(self._samples)), masks, both, on_batch)
        kl, cross_entropy = (torch.cat(found, dim=1) for found in zip(*parts, strict=True))
        return kl, cross_entropy

    def once(self, masks: Sequence[Mask]) -> float:
        """Nothing, as `prepare`."""
        return 0.0

    def prepare(self, masks: Sequence[Mask]) -> float:
        """Nothing: no part of it is paid once."""
        return 0.0

    def hints(self) -> tuple[Hints, float]:
        """Similarities of the dense residual stream over the first batches.

        All states of a batch wait together; where `host_bytes` does not hold those of all these
        batches, each pass takes fewer, at least one.
        """
        self._passes = 0
        self._enter()
        similarities = Similarities(2 * self._blocks + 1)
        batches = list(range(min(HINT_BATCHES, len(self._samples))))
        while batches:
            taken, room = [batches.pop(0)], self._host_bytes
            held = self._stream_bytes(taken[0])
            while batches and (room is None or held + self._stream_bytes(batches[0]) <= room):
                held += self._stream_bytes(batches[0])
                taken.append(batches.pop(0))
            stream = DenseStream(self._replayer, [self._entries[batch] for batch in taken])
            self._pass(stream, taken)
            for states in stream.states:
                similarities.add(states, self._streamed.device)
        return similarities.hints(), self._accounting.hints(similarities.tokens)

    def sensitivity(self) -> tuple[Sensitivity, float]:
        """Not to be had: raises ModelError."""
        raise ModelError(
            f"{self._streamed.anatomy.model_class}: gradients would need its blocks from the last "
            "to the first, which streaming doesn't bring: choose another search.method, or set "
            "model.streamed to false"
        )

    def _units(self, batches: Sequence[int], masks: Sequence[Mask]) -> list[UnitResult]:
        if not masks:
            return [UnitResult((), (), 0.0) for _ in batches]
        try:
            found = self._losses(batches, masks, self._judged)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(masks) == 1:
                return [UnitResult(((),), (Status.OUT_OF_MEMORY,), 0.0) for _ in batches]
        else:
            executed, sequences = self._accounting.executed(masks), self.sequences
            return [
                unit_result(losses, self._accounting.unit(executed, len(masks), sequences[batch]))
                for batch, (losses,) in zip(batches, found, strict=True)
            ]
        half = len(masks) // 2
        first, second = self._units(batches, masks[:half]), self._units(batches, masks[half:])
        return [joined(a, b) for a, b in zip(first, second, strict=True)]

    def _losses(
        self,
        batches: Sequence[int],
        masks: Sequence[Mask],
        judge: Losses,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Tensor, ...]]:
        """What `judge` says of each batch, every figure averaged to `[mask, sequence]`."""
        self._enter()
        order = sorted(dict.fromkeys(masks), key=lambda mask: mask.key)
        rows: list[list[dict[Mask, Tensor]]] = [[] for _ in batches]
        runs = self._runs(order, batches)
        for done, run in enumerate(runs):
            entries = [self._entries[batch] for batch in batches]
            waiting = Prefixes(self._replayer, self._mode, run, entries)
            self._pass(waiting, batches)
            with self._streamed.head():
                for place, batch in enumerate(batches):
                    students = [waiting.leaves[place][mask] for mask in run]
                    targets = self._samples[batch].targets
                    found = judge(students, self._teacher[batch], targets)
                    averaged = [self._samples[batch].by_sequence(figure) for figure in found]
                    rows[place] = rows[place] or [{} for _ in averaged]
                    for held, figure in zip(rows[place], averaged, strict=True):
                        held.update(zip(run, figure, strict=True))
                    if on_batch is not None and done == len(runs) - 1:
                        on_batch(place + 1, len(batches))
        return [
            tuple(torch.stack([held[mask] for mask in masks]) for held in found) for found in rows
        ]

    def _judged(
        self, students: Sequence[Tensor], teacher: Tensor, targets: Tensor
    ) -> Sequence[Tensor]:
        return (self._objective.losses(self._logits, students, teacher, targets),)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._replayer.logits(hidden.to(self._streamed.device))

    def _enter(self) -> None:
        """Read the embeddings, the first time only, for what enters the blocks."""
        if self._entries:
            return
        with self._streamed.embeddings():
            self._entries = tuple(
                Entry.of(sample, *self._replayer.entry(sample.ids)) for sample in self._samples
            )

    def _pass(self, wanted: Traveller, batches: Sequence[int]) -> None:
        """One pass over the weights, with the dense path of those batches that lack it."""
        missing = [batch for batch in batches if batch not in self._teacher]
        travellers = [wanted]
        if missing:
            dense = DensePath(self._replayer, [self._entries[batch] for batch in missing])
            travellers.append(dense)
        self._passes += 1
        for block in range(self._blocks):
            needed = any(traveller.needs(block) for traveller in travellers)
            with self._streamed.block(block) if needed else nullcontext():
                for traveller in travellers:
                    traveller.advance(block)
        if missing:
            self._teacher |= zip(missing, dense.leaves, strict=True)

    def _runs(self, order: Sequence[Mask], batches: Sequence[int]) -> list[list[Mask]]:
        """Sorted masks in the longest contiguous runs that `host_bytes` holds."""
        runs: list[list[Mask]] = [[]]
        for mask in order:
            room, more = self._host_bytes, [*runs[-1], mask]
            if runs[-1] and room is not None and self._waiting_bytes(more, batches) > room:
                runs.append([])
            runs[-1].append(mask)
        return runs

    def _waiting_bytes(self, masks: Sequence[Mask], batches: Sequence[int]) -> int:
        """The most bytes that hidden states of these sorted masks take at once on these batches.

        That is before the last block: a whole state for each prefix, for the dense path and for
        the one being worked on, and, growing, the positions looked at of every mask.
        """
        before_last = len({mask.keep[:-2] for mask in masks})
        sequences = sum(self.sequences[batch] for batch in batches)
        tokens = sequences * self.window_tokens
        looked_at = sequences * self._accounting.looked_at
        return ((before_last + 2) * tokens + len(masks) * looked_at) * self._token_bytes

    def _stream_bytes(self, batch: int) -> int:
        places = 2 * self._blocks + 1
        return places * self.sequences[batch] * self.window_tokens * self._token_bytes

    @property
    def _token_bytes(self) -> int:
        """The bytes of the hidden state of one token."""
        config: Any = self._streamed.model.config
        return int(config.get_text_config().hidden_size) * self._streamed.dtype.itemsize
