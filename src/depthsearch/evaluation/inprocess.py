"""The in-process backend: units computed by one model on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from depthsearch.calibration.objectives import Objective, figures
from depthsearch.evaluation.accounting import Accounting
from depthsearch.evaluation.backend import UnitResult
from depthsearch.evaluation.prefix import PrefixWalk
from depthsearch.evaluation.samples import draw_samples, halved, unit_result
from depthsearch.evaluation.sensitivity import gate_sensitivity
from depthsearch.evaluation.similarity import HINT_BATCHES, Similarities
from depthsearch.evaluation.stepping import Stepper
from depthsearch.evaluation.tabled import RepairTable
from depthsearch.evaluation.turns import Turn
from depthsearch.model.anatomy import Anatomy
from depthsearch.model.replay import Mode, Recording, Replayer
from depthsearch.space import Hints, Mask, Sensitivity


class InProcess:
    """Evaluates masks on windows `[sequence, window]` cut into batches of `batch_tokens`.

    `positions` is the share of positions of each sequence that the objective looks at, drawn once
    from `seed`. `mode` is the finest exact replay, from the self-check. With windows `fit` each gap
    of a mask is repaired as a `RepairTable` does. Raises DataError for no windows or windows of
    fewer than two tokens.
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
        fit: Tensor | None = None,
    ) -> None:
        self._device = next(model.parameters()).device
        self.replayer = Replayer(model, anatomy)
        pad = self.replayer.pad
        # A row of an encoder-decoder is as many tokens read as written, which count once.
        ids = batch_tokens * len(anatomy.stacks)
        self.samples = draw_samples(windows, ids, positions, seed, self._device, pad)
        self._objective = objective
        self.mode = mode
        self.batch_tokens = batch_tokens
        self._recordings: dict[int, Recording] = {}
        self.accounting = Accounting.of(
            model,
            anatomy,
            window_tokens=windows.shape[1] // len(anatomy.stacks),
            looked_at=self.samples[0].positions.shape[1],
            needs_teacher=objective.needs_teacher,
            mode=mode,
        )
        self._table: RepairTable | None = None
        if fit is not None:
            self.accounting = replace(self.accounting, repair="table")
            stepper = Stepper(self.replayer, mode)
            self._table = RepairTable(stepper, self.accounting, fit, batch_tokens)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences in each batch."""
        return tuple(int(sample.ids.shape[0]) for sample in self.samples)

    @property
    def window_tokens(self) -> int:
        """Tokens of one sequence."""
        return self.accounting.window_tokens

    @property
    def preparation(self) -> float:
        """The `cost_tokens` of the dense passes that record every batch, and the fit text."""
        fit = 0.0 if self._table is None else self._table.preparation
        return self.accounting.preparation(sum(self.sequences)) + fit

    def run(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int] = (), *, sure: bool = True
    ) -> UnitResult:
        """Compute one unit; out of memory splits the set, down to a single quarantined mask.

        What lies ahead is not begun.
        """
        return halved(partial(self._run, batch), masks)

    def _run(self, batch: int, masks: Sequence[Mask]) -> UnitResult:
        students, executed = self._students(batch, masks)
        return unit_result(
            self.losses(batch, students),
            self.accounting.unit(executed, len(masks), self.sequences[batch]),
        )

    def losses(self, batch: int, students: Sequence[Tensor]) -> Tensor:
        """Losses `[mask, sequence]` of states `[sequence * count, hidden]` at the positions."""
        sample, teacher = self.samples[batch], self._teacher(batch)
        found = self._objective.losses(self.replayer.logits, students, teacher, sample.targets)
        return sample.by_sequence(found)

    def figures(
        self, masks: Sequence[Mask], on_batch: Callable[[int, int], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """KL divergence and cross-entropy, each `[mask, sequence]` in float64, on every batch.

        For reporting: both from one pass, with no racing and no cost counted.
        """
        parts: list[tuple[Tensor, ...]] = []
        for batch, sample in enumerate(self.samples):
            students, _ = self._students(batch, masks)
            teacher = self._teacher(batch)
            found = figures(self.replayer.logits, students, teacher, sample.targets)
            parts.append(tuple(sample.by_sequence(part) for part in found))
            if on_batch is not None:
                on_batch(batch + 1, len(self.samples))
        kl, cross_entropy = (torch.cat(found, dim=1) for found in zip(*parts, strict=True))
        return kl, cross_entropy

    @torch.no_grad()
    def _students(self, batch: int, masks: Sequence[Mask]) -> tuple[list[Tensor], list[int]]:
        """Every mask's hidden states `[sequence * count, hidden]` at the positions looked at.

        Also how often each site was executed.
        """
        sample = self.samples[batch]
        states: dict[int, Tensor] = {}

        def leaf(place: int, hidden: Tensor) -> None:
            states[place] = sample.at(hidden)

        executed = self._hidden_states(self.recording(batch), masks, leaf)
        return [states[place] for place in range(len(masks))], executed

    def _teacher(self, batch: int) -> Tensor:
        """The dense model's hidden states `[sequence * count, hidden]` at the positions."""
        return self.samples[batch].at(self.recording(batch).last)

    def plan(self, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of evaluating `masks` on every batch, nothing computed."""
        return self.accounting.plan(masks, self.sequences) + self.once(masks)

    def once(self, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of the repairs that no mask needed before, not counted yet."""
        return 0.0 if self._table is None else self._table.cost(masks)

    def prepare(self, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of the repairs that no mask needed before."""
        return 0.0 if self._table is None else self._table.count(masks)

    def unit_cost(self, batch: int, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of one unit with nothing split or failing, nothing computed."""
        return self.accounting.plan(masks, self.sequences[batch : batch + 1])

    def _hidden_states(
        self, recording: Recording, masks: Sequence[Mask], leaf: Callable[[int, Tensor], None]
    ) -> list[int]:
        """Hand the last hidden states of every mask to `leaf`; returns executions by site."""
        if self.mode is Mode.WHOLE:
            for place, mask in enumerate(masks):
                leaf(place, self.replayer.whole(recording, mask))
            return self.accounting.executed(masks)
        stepper, table = Stepper(self.replayer, self.mode), self._table
        if table is not None:
            table.fit(masks)

        def advance(step: int, turn: Turn, hidden: Tensor) -> Tensor:
            with nullcontext() if table is None else table.applied(step, turn):
                return stepper.run(recording.calls, step, turn.kept, hidden)

        walk = PrefixWalk(stepper.steps, advance, self.accounting.repair)
        walk.run(masks, recording.first, leaf)
        return walk.executed

    @torch.no_grad()
    def hints(self) -> tuple[Hints, float]:
        """Similarities of the dense residual stream over the first batches."""
        anatomy = self.replayer.anatomy
        similarities = Similarities(len(anatomy.sites) + 1, anatomy.stack_ends)
        for batch in range(min(HINT_BATCHES, len(self.samples))):
            recording = self.recording(batch)
            seen = self.replayer.seen_by_stack(recording.ids)
            similarities.add(self.replayer.states(recording), self._device, seen)
        tokens = sum(self.sequences[:HINT_BATCHES]) * self.window_tokens
        return similarities.hints(), self.accounting.hints(tokens)

    def sensitivity(self) -> tuple[Sensitivity, float]:
        """First-order estimates of what each site is worth, over all batches."""
        found = gate_sensitivity(self.replayer, self.mode, self.samples, self.recording)
        return found, self.accounting.gradients(sum(self.sequences))

    def recording(self, batch: int) -> Recording:
        """One batch as the blocks of the dense model see it."""
        if batch not in self._recordings:
            self._recordings[batch] = self.replayer.record(self.samples[batch].ids)
        return self._recordings[batch]
