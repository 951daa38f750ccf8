"""Streamed weights on several workers: each takes a share of the batches, with all masks of a set.

A pass over the weights costs the same for one batch and for many, so what a worker gets at once is
as much as there is: a unit's batch number names several batches. Spread over batches, masks share
as many prefixes as on one worker; only where there are more workers than batches are masks parted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from depthsearch.evaluation.ahead import Ahead, Found
from depthsearch.evaluation.backend import UnitResult
from depthsearch.evaluation.crew import Answer
from depthsearch.evaluation.dispatch import Dispatcher
from depthsearch.evaluation.planned import Planned
from depthsearch.evaluation.streamed import Streamed
from depthsearch.space import Mask, Status


def share_number(batches: Sequence[int]) -> int:
    """The one number that names several batches: a bit for each."""
    return sum(1 << batch for batch in set(batches))


def share_batches(number: int) -> tuple[int, ...]:
    """The batches that `number` names, in order."""
    return tuple(batch for batch in range(number.bit_length()) if number >> batch & 1)


def share_answers(units: Sequence[UnitResult], sequences: Sequence[int]) -> tuple[Answer, ...]:
    """One answer a mask out of the units of a share, its losses one batch after the other.

    `sequences` are those of each batch. Where the losses of a batch are not finite they are NaN
    here; what failed for lack of memory did so for all batches.
    """
    answers = []
    for mask in range(len(units[0].losses)):
        statuses = [unit.statuses[mask] for unit in units]
        if Status.OUT_OF_MEMORY in statuses:
            answers.append(Answer((), Status.OUT_OF_MEMORY))
            continue
        parts = [
            unit.losses[mask] or (math.nan,) * count
            for unit, count in zip(units, sequences, strict=True)
        ]
        answers.append(Answer(tuple(loss for part in parts for loss in part), Status.OK))
    return tuple(answers)


def by_batch(
    answer: Answer, sequences: Sequence[int]
) -> Iterator[tuple[tuple[float, ...], Status]]:
    """Losses and status of each batch of a share again: the inverse of `share_answers`."""
    start = 0
    for count in sequences:
        part = answer.losses[start : start + count]
        start += count
        if answer.status is not Status.OK:
            yield (), answer.status
        elif all(map(math.isfinite, part)):
            yield part, Status.OK
        else:
            yield (), Status.NON_FINITE


class SpreadStreamed(Planned[Streamed]):
    """Evaluates masks on one text by workers that stream the weights: a `Backend`.

    `planner` is the same text in this process: it says what things cost and computes the hints, in
    a pass of its own. Losses are those of `Streamed`, and as there a set of masks is computed on
    this and all batches ahead at once, so that what a race ends early is computed but not counted.
    """

    def __init__(self, dispatcher: Dispatcher, planner: Streamed, text: str) -> None:
        super().__init__(planner)
        self._dispatcher = dispatcher
        self._text = text
        self._ahead = Ahead(self._compute)

    def run(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int] = (), *, sure: bool = True
    ) -> UnitResult:
        """The losses of one unit; all that lie ahead are computed with the first."""
        return self._ahead.unit(batch, masks, ahead, self._planner.unit_cost(batch, masks))

    def _compute(self, batches: Sequence[int], masks: Sequence[Mask]) -> Found:
        """Have `masks` computed on all `batches`, in a pass of each worker."""
        found = {}
        workers = max(1, self._dispatcher.places)
        shares = _shares(batches, workers)
        least = -(-len(masks) // max(1, workers // len(shares)))
        numbers = [share_number(share) for share in shares]
        for place, share in enumerate(shares):
            answers = self._dispatcher.compute(
                self._text, numbers[place], masks, numbers[place + 1 :], sure=True, least=least
            )
            sequences = [self.sequences[batch] for batch in share]
            for mask, answer in zip(masks, answers, strict=True):
                for batch, part in zip(share, by_batch(answer, sequences), strict=True):
                    found[batch, mask] = part
        return found


def _shares(batches: Sequence[int], workers: int) -> list[Sequence[int]]:
    """The batches in runs of nearly the same length, one a worker, none empty."""
    count = min(workers, len(batches))
    ends = [len(batches) * place // count for place in range(count + 1)]
    return [batches[start:end] for start, end in pairwise(ends)]
