"""Evaluating a set of masks batch by batch, dropping those that can no longer win.

After each batch a candidate is compared, on the same sequences, with the mask that holds the last
place that matters. It is out when the paired difference is worse by more than `MARGIN` standard
errors. Losses are paired, so what all masks find hard cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from depthsearch.evaluation.backend import Backend
from depthsearch.space import Evaluation, Mask, Stage, Status

MARGIN = 3.0
MIN_SEQUENCES = 4

OnUnit = Callable[[int, int, float], None]


def evaluate(
    backend: Backend,
    masks: Sequence[Mask],
    *,
    survivors: int | None = None,
    rivals: Sequence[Evaluation] = (),
    stages: Sequence[Stage] = (),
    on_unit: OnUnit | None = None,
) -> tuple[list[Evaluation], float]:
    """Evaluate `masks` on every batch; returns their evaluations in order and the cost_tokens.

    With `survivors` set, candidates that cannot be among that many best of masks and rivals are
    eliminated early; each of `stages` eliminates all but its best, once its share of the text is
    done. `on_unit(batches done, batches, cost_tokens so far)` follows each unit.
    """
    losses: list[list[float]] = [[] for _ in masks]
    statuses = [Status.OK] * len(masks)
    active = list(range(len(masks)))
    cost, total = 0.0, len(backend.sequences)
    sure = survivors is None and not stages
    cuts = list(stages)
    for batch in range(total):
        if not active:
            break
        result = backend.run(batch, [masks[i] for i in active], range(batch + 1, total), sure=sure)
        cost += result.cost_tokens
        for i, status, found in zip(active, result.statuses, result.losses, strict=True):
            statuses[i] = status
            losses[i].extend(found)
        active = [i for i in active if statuses[i] is Status.OK]
        if survivors is not None and batch + 1 < total:
            for i in losers({i: losses[i] for i in active}, survivors, rivals):
                statuses[i] = Status.ELIMINATED
            active = [i for i in active if statuses[i] is Status.OK]
        done = sum(backend.sequences[: batch + 1]) / sum(backend.sequences)
        while cuts and cuts[0].share <= done and batch + 1 < total:
            best = sorted(active, key=lambda i: (fmean(losses[i]), masks[i].key))
            for i in best[cuts.pop(0).survivors :]:
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


def losers(
    candidates: dict[int, list[float]], survivors: int, rivals: Sequence[Evaluation]
) -> list[int]:
    """The candidates that can no longer be among the `survivors` best of candidates and rivals.

    All candidates have losses on the same first sequences; rivals are cut to those.
    """
    if not candidates:
        return []
    seen = len(next(iter(candidates.values())))
    if seen < MIN_SEQUENCES:
        return []
    pool = [(fmean(found), found) for found in candidates.values()]
    pool += [
        (fmean(rival.losses[:seen]), list(rival.losses[:seen]))
        for rival in rivals
        if rival.status is Status.OK and len(rival.losses) >= seen
    ]
    if len(pool) <= survivors:
        return []
    bar, reference = sorted(pool, key=lambda entry: entry[0])[survivors - 1]
    out = []
    for place, found in candidates.items():
        if fmean(found) <= bar:
            continue
        differences = [a - b for a, b in zip(found, reference, strict=True)]
        mean = fmean(differences)
        spread = math.fsum((d - mean) ** 2 for d in differences) / (seen - 1) / seen
        if mean > MARGIN * math.sqrt(spread):
            out.append(place)
    return out
