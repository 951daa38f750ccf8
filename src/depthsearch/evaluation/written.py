"""The backend that scores masks by the text they write, in this process.

Each mask writes on its own, all prompts of a batch at once: what one has written decides what it
reads next, so masks share no prefix of a pass, and a unit costs the sum of its masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from depthsearch.calibration.chrf import chrf_losses
from depthsearch.calibration.tasks import Task
from depthsearch.evaluation.backend import UnitResult
from depthsearch.evaluation.decoding import decode_greedily, translate_greedily
from depthsearch.evaluation.inprocess import InProcess
from depthsearch.evaluation.samples import is_out_of_memory
from depthsearch.evaluation.similarity import HINT_BATCHES
from depthsearch.model.switches import masked
from depthsearch.space import Hints, Mask, Sensitivity, Status


def write(model: Any, task: Task, places: Sequence[int]) -> tuple[tuple[str, ...], int]:
    """What `model` writes for some prompts of `task`, all at once, and the passes it took."""
    prompts = [task.prompts[place] for place in places]
    most, ends = task.max_new_tokens, task.ends
    if task.starts is None:
        written, passes = decode_greedily(model, prompts, most, ends)
    else:
        written, passes = translate_greedily(model, prompts, task.starts, most, ends)
    return task.texts(written), passes


class Written:
    """Judges masks by chrF++ of what they write for `task`; a loss for each prompt, in points.

    Hints and gradients are those of `judge`, on its windows of text. Batches have its
    `batch_tokens` at most.
    """

    def __init__(self, judge: InProcess, task: Task) -> None:
        self._judge = judge
        self._task = task
        self._batches = task.batches(judge.batch_tokens)
        self._references: dict[int, tuple[str, ...]] = {}

    @property
    def sequences(self) -> tuple[int, ...]:
        """Prompts in each batch."""
        return tuple(map(len, self._batches))

    @property
    def window_tokens(self) -> int:
        """Tokens that one prompt and its answer take at most."""
        return self._task.longest + self._task.max_new_tokens

    @property
    def preparation(self) -> float:
        """The `cost_tokens` of the dense model's own texts, at their full length, where needed."""
        if self._task.references is not None:
            return 0.0
        return self.plan([Mask.dense(len(self._judge.replayer.anatomy.sites))])

    def run(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int] = (), *, sure: bool = True
    ) -> UnitResult:
        """Compute one unit, mask by mask; one that memory does not suffice for is quarantined.

        The cost is that of the tokens put through, padding included.
        """
        losses: list[tuple[float, ...]] = []
        statuses: list[Status] = []
        costs: list[float] = []
        for mask in masks:
            try:
                references = self._wanted(batch)
                texts, passes = self.texts(batch, mask)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                losses.append(())
                statuses.append(Status.OUT_OF_MEMORY)
                costs.append(0.0)
                continue
            losses.append(chrf_losses(texts, references))
            statuses.append(Status.OK)
            costs.append(self._cost(batch, mask, passes))
        return UnitResult(tuple(losses), tuple(statuses), sum(costs), tuple(costs))

    def texts(self, batch: int, mask: Mask) -> tuple[tuple[str, ...], int]:
        """What the masked model writes for the prompts of one batch, and the passes it took."""
        replayer = self._judge.replayer
        with masked(replayer.model, replayer.anatomy, mask) as model:
            return write(model, self._task, self._batches[batch])

    def plan(self, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of evaluating `masks` where each writes as long as it may."""
        return sum(self.unit_cost(batch, masks) for batch in range(len(self._batches)))

    def once(self, masks: Sequence[Mask]) -> float:
        """Nothing, as `prepare`."""
        return 0.0

    def prepare(self, masks: Sequence[Mask]) -> float:
        """Nothing is paid once."""
        return 0.0

    def unit_cost(self, batch: int, masks: Sequence[Mask]) -> float:
        """The most `cost_tokens` that one unit may take, nothing computed."""
        return sum(self._cost(batch, mask, self._task.max_new_tokens) for mask in masks)

    def hints(self) -> tuple[Hints, float]:
        """Similarities of the dense residual stream over the first batches of windows."""
        hints, cost = self._judge.hints()
        return hints, cost + self._recorded(0, HINT_BATCHES)

    def sensitivity(self) -> tuple[Sensitivity, float]:
        """First-order estimates of what each site is worth, over all batches of windows."""
        found, cost = self._judge.sensitivity()
        return found, cost + self._recorded(HINT_BATCHES, None)

    def _wanted(self, batch: int) -> tuple[str, ...]:
        """The references of one batch."""
        if self._task.references is not None:
            return tuple(self._task.references[place] for place in self._batches[batch])
        if batch not in self._references:
            dense = Mask.dense(len(self._judge.replayer.anatomy.sites))
            self._references[batch], _ = self.texts(batch, dense)
        return self._references[batch]

    def _cost(self, batch: int, mask: Mask, passes: int) -> float:
        prompts = [self._task.prompts[place] for place in self._batches[batch]]
        longest = max(map(len, prompts))
        return len(prompts) * self._judge.accounting.written(mask, longest, passes)

    def _recorded(self, start: int, stop: int | None) -> float:
        """The dense passes over some of the batches of windows, which hints take."""
        judge = self._judge
        return judge.accounting.preparation(sum(judge.sequences[start:stop]))
