"""Evaluating a set of masks batch by batch, dropping those that can no longer win.

After each batch a candidate is out when it is worse than as many masks as there are places that
matter, with a stated error rate (`elimination.py`), or, by successive halving, when it is not among
the best so far.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Literal

from depthsearch.evaluation.backend import Backend
from depthsearch.evaluation.elimination import MIN_SEQUENCES, Elimination
from depthsearch.space import Evaluation, Mask, Stage, Status

ERROR_RATE = 0.05

OnUnit = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Racing:
    """How candidates are stopped early: those worse with confidence, or all but a share.

    `error_rate` is the probability of a `paired` race to lose a mask that belongs among the best;
    `halving` keeps one in `eta` at each rung.
    """

    method: Literal["paired", "halving"] = "paired"
    error_rate: float = ERROR_RATE
    eta: int = 2

    def stages(
        self, candidates: int, survivors: int | None, sequences: Sequence[int]
    ) -> tuple[Stage, ...]:
        """The rungs of successive halving on batches of so many sequences; none for `paired`.

        One candidate in `eta` goes on, never fewer than `survivors`, and each has seen `eta` times
        as much text at the next rung (Jamieson and Talwalkar, 2016). The last rung is after one in
        `eta` of the text, the first after a batch and `MIN_SEQUENCES` sequences at least.
        """
        if self.method != "halving" or survivors is None:
            return ()
        least = max(MIN_SEQUENCES, sequences[0])
        kept: list[int] = []
        count, total = candidates, sum(sequences)
        while count > survivors and total >= least * self.eta ** (len(kept) + 1):
            count = max(survivors, -(-count // self.eta))
            kept.append(count)
        return tuple(
            Stage(1 / self.eta**place, left)
            for place, left in zip(range(len(kept), 0, -1), kept, strict=True)
        )


def evaluate(
    backend: Backend,
    masks: Sequence[Mask],
    *,
    survivors: int | None = None,
    rivals: Sequence[Evaluation] = (),
    stages: Sequence[Stage] = (),
    safe: Collection[Mask] = (),
    error_rate: float = ERROR_RATE,
    on_unit: OnUnit | None = None,
) -> tuple[list[Evaluation], float]:
    """Evaluate `masks` on every batch; returns their evaluations in order and the cost_tokens.

    With `survivors` set, candidates that cannot be among that many best of masks and rivals are
    eliminated early: over the whole race one that is falls with a probability of about `error_rate`
    at most, where the sequences are in random order and no mask fails. Each of `stages` eliminates
    all but its best, once its share of the text is done; those of `safe` always count among these.
    `on_unit(batches done, batches, cost_tokens so far)` follows each unit.
    """
    losses: list[list[float]] = [[] for _ in masks]
    statuses = [Status.OK] * len(masks)
    active = list(range(len(masks)))
    cost, total = 0.0, len(backend.sequences)
    sure = survivors is None and not stages
    cuts = list(stages)
    race = None if survivors is None else _race(backend, len(masks), rivals, survivors, error_rate)
    for batch in range(total):
        if not active:
            break
        result = backend.run(batch, [masks[i] for i in active], range(batch + 1, total), sure=sure)
        cost += result.cost_tokens
        for i, status, found in zip(active, result.statuses, result.losses, strict=True):
            statuses[i] = status
            losses[i].extend(found)
            if race is not None and status is not Status.OK:
                race.forget(i)
        active = [i for i in active if statuses[i] is Status.OK]
        if race is not None and batch + 1 < total:
            for i in race.losers({i: losses[i] for i in active}):
                statuses[i] = Status.ELIMINATED
            active = [i for i in active if statuses[i] is Status.OK]
        done = sum(backend.sequences[: batch + 1]) / sum(backend.sequences)
        while cuts and cuts[0].share <= done and batch + 1 < total:
            cut = [i for i in active if masks[i] not in safe]
            cut.sort(key=lambda i: (fmean(losses[i]), masks[i].key))
            for i in cut[max(0, cuts.pop(0).survivors - (len(active) - len(cut))) :]:
                statuses[i] = Status.ELIMINATED
            active = [i for i in active if statuses[i] is Status.OK]
        if on_unit is not None:
            on_unit(batch + 1, total, cost)
    tokens = backend.window_tokens
    return [
        Evaluation(
            mask,
            tuple(found) if status.has_loss else (),
            len(found) * tokens if status.has_loss else 0,
            status,
        )
        for mask, found, status in zip(masks, losses, statuses, strict=True)
    ], cost


def _race(
    backend: Backend,
    candidates: int,
    rivals: Sequence[Evaluation],
    survivors: int,
    error_rate: float,
) -> Elimination:
    ends = list(accumulate(backend.sequences))
    complete = [rival.losses for rival in rivals if rival.status is Status.OK]
    return Elimination(candidates, complete, survivors, ends[:-1], ends[-1], error_rate)
