"""Run a search that is written as a generator of batches.

Most methods read best from top to bottom: ask for this, look at the losses, ask for that. They are
generators that yield a `Batch` and receive the evaluations of its masks; this file turns one into a
`Searcher`: it cuts batches to the size asked for and never proposes a mask twice.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from depthsearch.searchers.protocol import check_ask, check_tell
from depthsearch.space import Batch, Evaluation, Mask, Proposal, Stage, Status

Answers = Mapping[Mask, Evaluation]
"""The evaluations of a batch by mask, earlier ones included; a mask that was cut is missing."""

Plan = Generator[Batch, Answers, None]


class StagedSearcher:
    """A `Searcher` that follows a plan."""

    def __init__(self, name: str, plan: Plan) -> None:
        self._name = name
        self._plan = plan
        self._started = False
        self._known: dict[Mask, Evaluation] = {}
        self._seen: set[Mask] = set()
        self._stage = Batch(())
        self._queue: list[Proposal] = []
        self._queued = 0
        self._waiting: tuple[Proposal, ...] = ()

    @property
    def name(self) -> str:
        """The method's public name."""
        return self._name

    def ask(self, n: int | None = None) -> Batch:
        """The next masks of the plan, at most `n`."""
        check_ask(n, self._waiting)
        while not self._queue:
            if not self._advance():
                return Batch(())
        count = len(self._queue) if n is None else n
        self._waiting, self._queue = tuple(self._queue[:count]), self._queue[count:]
        return Batch(self._waiting, self._stage.survivors, self._rivals(), self._stages())

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Learn the losses of the last ask."""
        check_tell(evaluations, self._waiting)
        self._known.update((evaluation.mask, evaluation) for evaluation in evaluations)
        self._waiting = ()

    def _advance(self) -> bool:
        """Take the plan's next batch into the queue; False when the plan has ended."""
        try:
            if self._started:
                self._stage = self._plan.send(
                    {
                        proposal.mask: self._known[proposal.mask]
                        for proposal in self._stage.proposals
                        if proposal.mask in self._known
                    }
                )
            else:
                self._started = True
                self._stage = next(self._plan)
        except StopIteration:
            self._stage = Batch(())
            return False
        for proposal in self._stage.proposals:
            if proposal.mask not in self._seen:
                self._seen.add(proposal.mask)
                self._queue.append(proposal)
        self._queued = len(self._queue)
        return True

    def _stages(self) -> tuple[Stage, ...]:
        """The cuts of the plan's batch: of a part of it, as large a share goes on."""
        part = Fraction(len(self._waiting), self._queued)
        return tuple(
            replace(stage, survivors=max(1, math.ceil(stage.survivors * part)))
            for stage in self._stage.stages
        )

    def _rivals(self) -> tuple[Mask, ...]:
        """The batch's rivals and those of its masks that are known already, best first."""
        if self._stage.survivors is None:
            return ()
        masks = dict.fromkeys(
            (*self._stage.rivals, *(proposal.mask for proposal in self._stage.proposals))
        )
        known = [self._known[mask] for mask in masks if mask in self._known]
        return best_masks(known, self._stage.survivors)


def best_masks(evaluations: Sequence[Evaluation], count: int) -> tuple[Mask, ...]:
    """The masks of the `count` best evaluations among those at full fidelity."""
    complete = sorted((e for e in evaluations if e.status is Status.OK), key=lambda e: e.order)
    return tuple(e.mask for e in complete[:count])
