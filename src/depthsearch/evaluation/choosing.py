"""Which of the queued runs a worker gets next, and how much of it.

A worker keeps the dense model's states of every batch that it has met, so it goes on with those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from depthsearch.evaluation.cutting import Pool, Run

GRAIN = 1.8
"""The part of a worker's share of what is left that a unit takes is one over this."""

_SMALL = 2
_WANTED, _FRESH, _KNOWN = 1 << 60, 1 << 50, 1 << 40


def choose(
    pool: Pool,
    wanted: int | None,
    seen: Collection[int],
    seers: Mapping[int, int],
    *,
    allowed: Callable[[Run], bool],
    second: float | None = None,
) -> Run | None:
    """The best run for a worker that has `seen` these batches; None where others should try.

    First what is waited for: batch `wanted`, or everything where that is None; then what nobody
    failed with, then batches that it has seen; of those the run with most left, or of what is not
    waited for the first. `allowed(run)` says whether it may have what others failed with. A rest
    that costs less than recording its batch is left to the `seers`, the workers by batch that have,
    if there are any. With `second` the unit will wait behind another one: only a whole run that is
    waited for and costs no more than that.
    """
    best: Run | None = None
    most = -math.inf
    for run in pool:
        batch, cost = run.batch, run.cost
        now = wanted is None or batch == wanted
        if second is not None and (not now or cost > second):
            continue
        known = batch in seen
        # One number, because this is where a driver of many workers spends its time.
        if run.tried:
            value = _WANTED if now else 0
        elif now:
            value = _WANTED + _FRESH + (_KNOWN + cost if known else cost)
        else:
            value = _FRESH + (_KNOWN - batch if known else -batch)
        if value <= most:
            continue
        if run.tried:
            if not allowed(run):
                continue
        elif not known and cost <= run.sheet.record and seers.get(batch, 0):
            continue
        best, most = run, value
    return best


def target(share: float, run: Run) -> float:
    """What the next unit of a run may cost, so that workers end together.

    `share` is the time until all would be done if work could be parted at will, in sublayers. A
    unit is a fixed part of that, as in guided self-scheduling (Polychronopoulos and Kuck, 1987):
    whole batches, which share most, while there is much to do, and small at the end; but where no
    more than two masks are a share, all of it, for to part them costs more than it evens out.
    """
    return max(share / GRAIN, min(share, _SMALL * run.sheet.cost(run.start, run.start + 1)))
