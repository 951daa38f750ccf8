"""The in-process backend: units computed by one model on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from depthsearch.calibration.objectives import Objective, figures
from depthsearch.calibration.windows import batches
from depthsearch.errors import DataError, ModelError
from depthsearch.evaluation.backend import UnitResult
from depthsearch.evaluation.prefix import PrefixWalk, executed_sites, steps_of
from depthsearch.model.anatomy import Anatomy
from depthsearch.model.costs import cost_table, head_flops
from depthsearch.model.replay import Mode, Recording, Replayer
from depthsearch.space import Hints, Mask, Status

_HINT_BATCHES = 4
_HINT_TOKENS = 128


class InProcess:
    """Evaluates masks on windows `[sequence, window]` cut into batches of `batch_tokens`.

    `positions` is the share of positions of each sequence that the objective looks at, drawn once
    from `seed`. `mode` is the finest exact replay, from the self-check. Raises DataError for no
    windows or windows of fewer than two tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        windows: Tensor,
        objective: Objective,
        *,
        mode: Mode,
        batch_tokens: int = 1024,
        positions: float = 0.25,
        seed: int = 0,
    ) -> None:
        if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
            raise DataError(
                f"calibration windows must be [sequence, 2 or more tokens]: got "
                f"{list(windows.shape)}"
            )
        self._replayer = Replayer(model, anatomy)
        self._anatomy = anatomy
        self._objective = objective
        self._mode = mode
        self._width = 1 if mode is Mode.SITE else 2
        self._window = windows.shape[1]
        device = next(model.parameters()).device
        self._batches = tuple(batch.to(device) for batch in batches(windows, batch_tokens))
        looked_at = max(1, math.ceil(positions * (self._window - 1)))
        self._positions = tuple(
            _draw_positions(batch.shape[0], self._window, looked_at, seed, index).to(device)
            for index, batch in enumerate(self._batches)
        )
        self._recordings: dict[int, Recording] = {}
        flops = cost_table(model, anatomy, self._window).of("flops")
        self._site_flops = flops.sites
        self._head_flops = head_flops(model)
        self._dense_flops = sum(flops.sites) + self._head_flops

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences in each batch."""
        return tuple(int(batch.shape[0]) for batch in self._batches)

    @property
    def window_tokens(self) -> int:
        """Tokens of one sequence."""
        return self._window

    @property
    def preparation(self) -> float:
        """The `cost_tokens` of the one dense pass that records every batch."""
        tokens = sum(self.sequences) * self._window
        return tokens * sum(self._site_flops) / self._dense_flops

    def run(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int] = (), *, sure: bool = True
    ) -> UnitResult:
        """Compute one unit; out of memory splits the set, down to a single quarantined mask.

        What lies ahead is not begun.
        """
        try:
            return self._run(batch, masks)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(masks) == 1:
                return UnitResult(((),), (Status.OUT_OF_MEMORY,), 0.0)
        half = len(masks) // 2
        first, second = self.run(batch, masks[:half]), self.run(batch, masks[half:])
        return UnitResult(
            first.losses + second.losses,
            first.statuses + second.statuses,
            first.cost_tokens + second.cost_tokens,
        )

    def _run(self, batch: int, masks: Sequence[Mask]) -> UnitResult:
        students, teacher, targets, executed = self._at_positions(batch, masks)
        found = self._objective.losses(self._replayer.logits, students, teacher, targets)
        losses = self._by_sequence(batch, found)
        finite = losses.isfinite().all(-1).tolist()
        return UnitResult(
            tuple(
                tuple(row) if ok else () for row, ok in zip(losses.tolist(), finite, strict=True)
            ),
            tuple(Status.OK if ok else Status.NON_FINITE for ok in finite),
            self._cost(executed, len(masks), self._positions[batch]),
        )

    def figures(
        self, masks: Sequence[Mask], on_batch: Callable[[int, int], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """KL divergence and cross-entropy, each `[mask, sequence]` in float64, on every batch.

        For reporting: both from one pass, with no racing and no cost counted.
        """
        parts: list[tuple[Tensor, ...]] = []
        for batch in range(len(self._batches)):
            students, teacher, targets, _ = self._at_positions(batch, masks)
            found = figures(self._replayer.logits, students, teacher, targets)
            parts.append(tuple(self._by_sequence(batch, part) for part in found))
            if on_batch is not None:
                on_batch(batch + 1, len(self._batches))
        kl, cross_entropy = (torch.cat(found, dim=1) for found in zip(*parts, strict=True))
        return kl, cross_entropy

    @torch.no_grad()
    def _at_positions(
        self, batch: int, masks: Sequence[Mask]
    ) -> tuple[list[Tensor], Tensor, Tensor, list[int]]:
        """What an objective needs of one batch, and how often each site was executed.

        Hidden states `[sequence * count, hidden]` of every mask and of the dense model at the
        positions looked at, and the next tokens there.
        """
        recording = self._recording(batch)
        positions = self._positions[batch]
        states: dict[int, Tensor] = {}

        def leaf(place: int, hidden: Tensor) -> None:
            states[place] = _at(hidden, positions)

        executed = self._hidden_states(recording, masks, leaf)
        return (
            [states[place] for place in range(len(masks))],
            _at(recording.last, positions),
            recording.ids.gather(1, positions + 1).flatten(),
            executed,
        )

    def _by_sequence(self, batch: int, losses: Tensor) -> Tensor:
        """The mean over positions: `[mask, sequence]` of `[mask, sequence * count]`."""
        by_sequence: Tensor = losses.double().unflatten(1, tuple(self._positions[batch].shape))
        return by_sequence.mean(-1)

    def plan(self, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of evaluating `masks` on every batch, nothing computed."""
        if not masks:
            return 0.0
        executed = self._executed(masks)
        return sum(self._cost(executed, len(masks), positions) for positions in self._positions)

    def unit_cost(self, batch: int, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of one unit with nothing split or failing, nothing computed."""
        return self._cost(self._executed(masks), len(masks), self._positions[batch])

    def _executed(self, masks: Sequence[Mask]) -> list[int]:
        """How often each site would be run for `masks` on one batch."""
        if self._mode is Mode.WHOLE:
            return [sum(mask.keep[i] for mask in masks) for i in range(len(masks[0]))]
        return executed_sites(masks, self._width)

    def _cost(self, executed: Sequence[int], masks: int, positions: Tensor) -> float:
        sequences, looked_at = positions.shape
        body = sum(n * cost for n, cost in zip(executed, self._site_flops, strict=True))
        heads = (masks + self._objective.needs_teacher) * looked_at * sequences
        flops = body * sequences * self._window + heads * self._head_flops
        return flops / self._dense_flops

    def _hidden_states(
        self, recording: Recording, masks: Sequence[Mask], leaf: Callable[[int, Tensor], None]
    ) -> list[int]:
        """Hand the last hidden states of every mask to `leaf`; returns executions by site."""
        if self._mode is Mode.WHOLE:
            for place, mask in enumerate(masks):
                leaf(place, self._replayer.whole(recording, mask))
            return [sum(mask.keep[i] for mask in masks) for i in range(len(self._anatomy.sites))]

        def advance(step: int, kept: tuple[bool, ...], hidden: Tensor) -> Tensor:
            if self._width == 1:
                block, place = divmod(step, 2)
                attention, ffn = place == 0, place == 1
            else:
                block, (attention, ffn) = step, kept
            return self._replayer.step(recording, block, hidden, attention=attention, ffn=ffn)

        walk = PrefixWalk(steps_of(len(self._anatomy.sites), self._width), advance)
        walk.run(masks, recording.first, leaf)
        return walk.executed

    @torch.no_grad()
    def hints(self) -> tuple[Hints, float]:
        """Similarities of the dense residual stream over the first batches."""
        size = len(self._anatomy.sites) + 1
        cosine = torch.zeros((size, size), dtype=torch.float64)
        angular = torch.zeros_like(cosine)
        tokens = 0
        for batch in range(min(_HINT_BATCHES, len(self._batches))):
            states = self._replayer.states(self._recording(batch))
            stream = torch.stack([s.flatten(0, 1) for s in states], dim=1)
            for part in stream.split(_HINT_TOKENS):
                unit = torch.nn.functional.normalize(part.float(), dim=-1)
                similar = (unit @ unit.transpose(1, 2)).clamp(-1, 1).double().cpu()
                cosine += similar.sum(0)
                angular += (similar.arccos() / math.pi).sum(0)
            tokens += stream.shape[0]
        if not (cosine.isfinite().all() and angular.isfinite().all()):
            raise ModelError(
                "the hidden states of the dense model are not finite on the calibration text: load "
                "it with another model.dtype, such as float32"
            )
        # For the stream inside the blocks every attention runs twice.
        executed = sum(self._site_flops) + sum(self._site_flops[::2])
        cost = tokens * executed / self._dense_flops
        return Hints(_rows(cosine / tokens), _rows(angular / tokens)), cost

    def _recording(self, batch: int) -> Recording:
        if batch not in self._recordings:
            self._recordings[batch] = self._replayer.record(self._batches[batch])
        return self._recordings[batch]


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on the processor torch raises a plain RuntimeError for that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)


def _draw_positions(sequences: int, window: int, count: int, seed: int, batch: int) -> Tensor:
    """Sorted positions `[sequence, count]` that have a next token, drawn without repetition."""
    rng = np.random.default_rng([seed, batch])
    drawn = [np.sort(rng.choice(window - 1, size=count, replace=False)) for _ in range(sequences)]
    return torch.from_numpy(np.stack(drawn))


def _at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states `[sequence * count, hidden]` at the positions `[sequence, count]`."""
    index = positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index).flatten(0, 1)


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(x) for x in row) for row in matrix.tolist())
