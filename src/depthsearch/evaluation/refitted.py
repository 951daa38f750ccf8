"""The backend that scores masks after repair, in-process.

All batches are judged at once, since the fits are the same for each of them: there is one unit for
a set of masks, and a race between batches would save little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from depthsearch.evaluation.accounting import Accounting
from depthsearch.evaluation.backend import UnitResult
from depthsearch.evaluation.fitting import FitCost, FitText
from depthsearch.evaluation.inprocess import InProcess
from depthsearch.evaluation.refitting import Prefix, RefitWalk, Tally
from depthsearch.evaluation.samples import halved, unit_result
from depthsearch.evaluation.stepping import Stepper
from depthsearch.evaluation.turns import Repair
from depthsearch.model.repair import Patch
from depthsearch.space import Hints, Mask, Sensitivity


class Refitted:
    """Judges masks, repaired on the windows `fit` `[sequence, window]`, as `judge` does unrepaired.

    `toward_text` is how far, in nats, the targets lean toward what predicts `fit` (see `Leaning`).
    Raises UnsupportedModelError for a model that can't be repaired.
    """

    def __init__(
        self,
        judge: InProcess,
        fit: Tensor,
        repair: Repair,
        *,
        operator: str = "refit",
        toward_text: float = 0.0,
    ) -> None:
        self._judge = judge
        self._repair: Repair = repair
        self._stepper = Stepper(judge.replayer, judge.mode)
        self._fit = FitText(self._stepper, fit, judge.batch_tokens, operator, toward_text)
        self._leans = toward_text > 0
        self._cost = FitCost.of(judge.replayer, self._fit.tokens, operator)

    @property
    def sequences(self) -> tuple[int, ...]:
        """All sequences, as one batch."""
        return (sum(self._judge.sequences),)

    @property
    def window_tokens(self) -> int:
        """Tokens of one sequence."""
        return self._judge.window_tokens

    @property
    def ill_conditioned(self) -> int:
        """How many fits so far gave no repair because no system could be solved."""
        return self._fit.ill_conditioned

    @property
    def preparation(self) -> float:
        """The `cost_tokens` of the dense passes that record both texts, and of gradients there."""
        accounting, tokens = self._judge.accounting, self._fit.tokens
        gradients = accounting.leaning(tokens) if self._leans else 0.0
        return self._judge.preparation + accounting.body(tokens) + gradients

    def run(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int] = (), *, sure: bool = True
    ) -> UnitResult:
        """Compute the one unit; out of memory splits the set, down to a quarantined mask."""
        return halved(self._run, masks)

    def once(self, masks: Sequence[Mask]) -> float:
        """Nothing, as `prepare`."""
        return 0.0

    def prepare(self, masks: Sequence[Mask]) -> float:
        """Nothing that a unit does not count itself."""
        return 0.0

    def plan(self, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of evaluating `masks`, nothing computed."""
        if not masks:
            return 0.0
        walk = RefitWalk(self._stepper.steps, self._repair, None, None)
        walk.run(masks, (), lambda *_: None)
        return self._tokens(walk.tally, len(masks))

    def unit_cost(self, batch: int, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of one unit with nothing split or failing, nothing computed."""
        return self.plan(masks)

    def hints(self) -> tuple[Hints, float]:
        """Similarities of the dense residual stream over the first batches."""
        return self._judge.hints()

    def sensitivity(self) -> tuple[Sensitivity, float]:
        """First-order estimates of what each site of the unrepaired model is worth."""
        return self._judge.sensitivity()

    def repair(self, mask: Mask) -> tuple[Patch, ...]:
        """The refitted weights of one mask, in the order of their sites."""
        found: list[Prefix] = []
        walk = RefitWalk(self._stepper.steps, self._repair, self._stepper, self._fit)
        walk.run([mask], (), lambda _, prefix: found.append(prefix))
        return found[0].patches

    @torch.no_grad()
    def _run(self, masks: Sequence[Mask]) -> UnitResult:
        judge = self._judge
        recordings = [judge.recording(batch) for batch in range(len(judge.sequences))]
        students: list[dict[int, Tensor]] = [{} for _ in recordings]

        def leaf(place: int, prefix: Prefix) -> None:
            for batch, hidden in enumerate(prefix.judged):
                students[batch][place] = judge.samples[batch].at(hidden)

        walk = RefitWalk(self._stepper.steps, self._repair, self._stepper, self._fit)
        walk.run(masks, tuple((r.calls, r.first) for r in recordings), leaf)
        losses = [
            judge.losses(batch, [found[place] for place in range(len(masks))])
            for batch, found in enumerate(students)
        ]
        return unit_result(torch.cat(losses, dim=1), self._tokens(walk.tally, len(masks)))

    def _tokens(self, tally: Tally, masks: int) -> float:
        accounting: Accounting = self._judge.accounting
        judged = accounting.unit(tally.judged, masks, sum(self._judge.sequences))
        flops = sum(
            tally.fit[site] * self._fit.tokens * flops
            + tally.normals[site] * self._cost.normal[site]
            + tally.factors[site] * self._cost.factor[site]
            + tally.solves[site] * self._cost.solve[site]
            for site, flops in enumerate(accounting.site_flops)
        )
        return judged + float(flops) / accounting.dense_flops


def repairing(
    repair: Repair, fit: Tensor | None, *, toward_text: float = 0.0, **judge: Any
) -> InProcess | Refitted:
    """What judges masks after `repair` on the windows `fit`; `judge` is what `InProcess` takes.

    `toward_text` is that of `Refitted`; a table of repairs takes none.
    """
    if repair == "none":
        return InProcess(**judge)
    assert fit is not None
    if repair == "table":
        return InProcess(**judge, fit=fit)
    return Refitted(InProcess(**judge), fit, repair, toward_text=toward_text)
