"""What evaluations may cost at most, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from depthsearch.evaluation import Backend
from depthsearch.space import Mask, SearchSpace, Stage


def finalist(space: SearchSpace, finals: Backend) -> float:
    """What a finalist costs at least, in `cost_tokens`.

    Where masks are repaired the first window may cost many times what the dense model does, which
    has no gap to refit behind.
    """
    masks = (space.dense, *space.windows()[:1])
    return max(finals.plan([mask]) for mask in masks)


def heads_price(prices: Sequence[float], new: float, safe: float, more: int) -> float:
    """The most that the best mask of a budget and its best baselines may come to cost.

    By now they cost `prices`, the best mask first. Of the masks that are about to be known each
    costs at most `new`, each baseline at most `safe`, and at most `more` of these are added.
    """
    best = max([*prices[:1], new])
    return best + sum(max(price, safe) for price in prices[1:]) + more * safe


def planned(backend: Backend, masks: Sequence[Mask], stages: Sequence[Stage] = ()) -> float:
    """The most that evaluating these may cost, with what `stages` are sure to save."""
    whole = backend.plan(masks)
    if not stages or not masks:
        return whole
    # A survivor alone shares nothing: what each would cost then bounds what all of them do.
    alone = max(backend.plan([mask]) - backend.once([mask]) for mask in masks)
    batches, cost = backend.sequences, backend.once(masks)
    rate, done = whole - cost, 0
    cuts = list(stages)
    for count in batches:
        cost += rate * count / sum(batches)
        done += count
        while cuts and cuts[0].share * sum(batches) <= done:
            rate = min(rate, cuts.pop(0).survivors * alone)
    return cost
