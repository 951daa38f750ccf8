"""The in-process backend: units computed by one model on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from depthsearch.calibration.objectives import Objective, figures
from depthsearch.evaluation.accounting import Accounting, width
from depthsearch.evaluation.backend import UnitResult
from depthsearch.evaluation.prefix import PrefixWalk, steps_of
from depthsearch.evaluation.samples import draw_samples, is_out_of_memory, joined, unit_result
from depthsearch.evaluation.similarity import HINT_BATCHES, Similarities
from depthsearch.model.anatomy import Anatomy
from depthsearch.model.replay import Mode, Recording, Replayer
from depthsearch.space import Hints, Mask, Status


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
        self._device = next(model.parameters()).device
        self._samples = draw_samples(windows, batch_tokens, positions, seed, self._device)
        self._replayer = Replayer(model, anatomy)
        self._anatomy = anatomy
        self._objective = objective
        self._mode = mode
        self._recordings: dict[int, Recording] = {}
        self._accounting = Accounting.of(
            model,
            anatomy,
            window_tokens=windows.shape[1],
            looked_at=self._samples[0].positions.shape[1],
            needs_teacher=objective.needs_teacher,
            mode=mode,
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
        """The `cost_tokens` of the one dense pass that records every batch."""
        return self._accounting.preparation(sum(self.sequences))

    def run(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int] = (), *, sure: bool = True
    ) -> UnitResult:
        """Compute one unit; out of memory splits the set, down to a single quarantined mask.

        What lies ahead is not begun.
        """
        try:
            return self._run(batch, masks)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(masks) == 1:
                return UnitResult(((),), (Status.OUT_OF_MEMORY,), 0.0)
        half = len(masks) // 2
        return joined(self.run(batch, masks[:half]), self.run(batch, masks[half:]))

    def _run(self, batch: int, masks: Sequence[Mask]) -> UnitResult:
        students, teacher, targets, executed = self._at_positions(batch, masks)
        found = self._objective.losses(self._replayer.logits, students, teacher, targets)
        return unit_result(
            self._samples[batch].by_sequence(found),
            self._accounting.unit(executed, len(masks), self.sequences[batch]),
        )

    def figures(
        self, masks: Sequence[Mask], on_batch: Callable[[int, int], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """KL divergence and cross-entropy, each `[mask, sequence]` in float64, on every batch.

        For reporting: both from one pass, with no racing and no cost counted.
        """
        parts: list[tuple[Tensor, ...]] = []
        for batch, sample in enumerate(self._samples):
            students, teacher, targets, _ = self._at_positions(batch, masks)
            found = figures(self._replayer.logits, students, teacher, targets)
            parts.append(tuple(sample.by_sequence(part) for part in found))
            if on_batch is not None:
                on_batch(batch + 1, len(self._samples))
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
        recording, sample = self._recording(batch), self._samples[batch]
        states: dict[int, Tensor] = {}

        def leaf(place: int, hidden: Tensor) -> None:
            states[place] = sample.at(hidden)

        executed = self._hidden_states(recording, masks, leaf)
        return (
            [states[place] for place in range(len(masks))],
            sample.at(recording.last),
            sample.targets,
            executed,
        )

    def plan(self, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of evaluating `masks` on every batch, nothing computed."""
        return self._accounting.plan(masks, self.sequences)

    def unit_cost(self, batch: int, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of one unit with nothing split or failing, nothing computed."""
        return self._accounting.plan(masks, self.sequences[batch : batch + 1])

    def _hidden_states(
        self, recording: Recording, masks: Sequence[Mask], leaf: Callable[[int, Tensor], None]
    ) -> list[int]:
        """Hand the last hidden states of every mask to `leaf`; returns executions by site."""
        if self._mode is Mode.WHOLE:
            for place, mask in enumerate(masks):
                leaf(place, self._replayer.whole(recording, mask))
            return self._accounting.executed(masks)
        sites = width(self._mode)

        def advance(step: int, kept: tuple[bool, ...], hidden: Tensor) -> Tensor:
            if sites == 1:
                block, place = divmod(step, 2)
                attention, ffn = place == 0, place == 1
            else:
                block, (attention, ffn) = step, kept
            return self._replayer.step(recording, block, hidden, attention=attention, ffn=ffn)

        walk = PrefixWalk(steps_of(len(self._anatomy.sites), sites), advance)
        walk.run(masks, recording.first, leaf)
        return walk.executed

    @torch.no_grad()
    def hints(self) -> tuple[Hints, float]:
        """Similarities of the dense residual stream over the first batches."""
        similarities = Similarities(len(self._anatomy.sites) + 1)
        for batch in range(min(HINT_BATCHES, len(self._samples))):
            similarities.add(self._replayer.states(self._recording(batch)), self._device)
        return similarities.hints(), self._accounting.hints(similarities.tokens)

    def _recording(self, batch: int) -> Recording:
        if batch not in self._recordings:
            self._recordings[batch] = self._replayer.record(self._samples[batch].ids)
        return self._recordings[batch]
