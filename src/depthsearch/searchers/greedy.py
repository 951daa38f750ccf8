"""Greedy iterative removal: drop what hurts least, measure again, until the budget is met.

With exchanges, what was dropped early may come back: after each removal, as long as that lowers the
loss, one unit is put back and others are dropped for it, as in floating feature selection (Pudil,
Novovicova and Kittler 1994, "Floating search methods in feature selection").
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from depthsearch.searchers.moves import exchange_neighbours
from depthsearch.searchers.options import at_least
from depthsearch.searchers.protocol import propose
from depthsearch.searchers.ranking import (
    freed_cost,
    increases_from,
    influence_keys,
    loss_increases,
    price,
    reference_of,
    removal_keys,
    renewed_keys,
)
from depthsearch.searchers.staged import Answers, Plan
from depthsearch.space import Batch, Evaluation, Hints, Mask, Proposal, SearchSpace, Status

Rule = Literal["cost_aware", "plain"]


@dataclass(frozen=True)
class GreedyOptions:
    """`plain` takes the lowest loss (SLEB, BlockPruner, FinerCut).

    `cost_aware` takes the least loss increase per unit of budget freed. After each removal come at
    most `exchange` exchanges, each the best of `exchange_candidates` masks (0 exchanges: none).
    """

    rule: Rule = "cost_aware"
    exchange: int = 0
    exchange_candidates: int = 16

    def __post_init__(self) -> None:
        at_least(self, exchange=0, exchange_candidates=1)


def greedy_plan(
    space: SearchSpace, hints: Hints, rng: np.random.Generator, options: GreedyOptions
) -> Plan:
    """One batch a step: every mask one unit smaller, those that meet the budget filled up to it.

    Candidates whose evaluation failed are passed over; a step in which all fail ends the search.
    """
    mask = space.dense
    dense: Evaluation | None = None
    keys = influence_keys(space, hints)
    aware = options.rule == "cost_aware"
    if aware or options.exchange or space.fits(mask):
        answers = yield Batch((propose(space, mask, "greedy dense"),))
        dense = answers.get(mask)
    current, measured = dense, keys
    seen: set[Mask] = set()
    step = 0
    while not space.fits(mask):
        step += 1
        targets = candidates(space, mask, keys)
        if not targets:
            # Pairs can run out above the cap where a repair that starts over still finds a way.
            yield Batch((Proposal(space.repair(mask, rng), f"greedy repair {step}"),))
            return
        answers = yield Batch(
            tuple(propose(space, target, f"greedy step {step}") for target in targets),
            1 if can_race(space, options.rule, targets) else None,
        )
        ranked = ranking(options.rule, answers, targets, current)
        if not ranked:
            return
        if step == 1:
            measured = keys = removal_keys(
                space, loss_increases(space, answers.values(), dense), keys
            )
        else:
            measured = renewed_keys(
                space, increases_from(mask, answers.values(), current), measured
            )
        current = answers[ranked[0]]
        if options.exchange:
            seen.update(targets)
            origin = f"greedy exchange {step}"
            current = yield from _exchanges(space, current, dense, measured, seen, options, origin)
        mask = current.mask


def candidates(space: SearchSpace, mask: Mask, keys: Sequence[float]) -> Mapping[Mask, int]:
    """The masks one unit smaller, filled up to the budget if they meet it; what each frees."""
    found: dict[Mask, int] = {}
    for smaller in space.removals(mask):
        target = space.fill(smaller, keys) if space.fits(smaller) else smaller
        found[target] = freed_cost(space, mask, target)
    return found


def can_race(
    space: SearchSpace, rule: Rule, freed: Mapping[Mask, int], rivals: Sequence[Mask] = ()
) -> bool:
    """Whether masks that free so much are ranked by their losses alone, as rivals of each other.

    Masks that meet the budget are no rivals of larger ones, to which they would lose for good.
    """
    by_loss = rule == "plain" or len(set(freed.values())) == 1
    return by_loss and len({space.fits(mask) for mask in (*freed, *rivals)}) == 1


def ranking(
    rule: Rule, answers: Answers, freed: Mapping[Mask, int], before: Evaluation | None
) -> list[Mask]:
    """The masks of `freed` that have a loss, best first: complete losses go before partial ones.

    Loss increases count from `before`, and so does what each mask frees; unknown, it counts as 0.
    Partial losses are compared on the sequences that masks have in common.
    """
    reference = reference_of((before, *answers.values()))
    base = 0.0 if before is None or before.loss is None else before.estimate(reference)
    scores = {
        mask: (
            evaluation.order[0],
            price(loss - base, amount) if rule == "cost_aware" else loss,
            mask.key,
        )
        for mask, amount in freed.items()
        if (evaluation := answers.get(mask)) is not None and evaluation.loss is not None
        for loss in (evaluation.estimate(reference),)
    }
    return sorted(scores, key=lambda mask: scores[mask])


def _exchanges(
    space: SearchSpace,
    current: Evaluation,
    dense: Evaluation | None,
    keys: Sequence[float],
    seen: set[Mask],
    options: GreedyOptions,
    origin: str,
) -> Generator[Batch, Answers, Evaluation]:
    """Exchange while it lowers the loss; masks seen before lost to this one already.

    Only complete losses are compared, so that an exchange is never taken for easy sequences.
    """
    for _ in range(options.exchange):
        if current.status is not Status.OK or current.loss is None:
            break
        neighbours = exchange_neighbours(space, current.mask, keys)
        fresh = [mask for mask in neighbours if mask not in seen][: options.exchange_candidates]
        if not fresh:
            break
        seen.update(fresh)
        freed = {mask: freed_cost(space, space.dense, mask) for mask in fresh}
        answers = yield Batch(
            tuple(propose(space, mask, origin) for mask in fresh),
            1 if can_race(space, options.rule, freed, (current.mask,)) else None,
            (current.mask,),
        )
        better = {
            mask: evaluation
            for mask, evaluation in answers.items()
            if evaluation.status is Status.OK
            and evaluation.loss is not None
            and evaluation.loss < current.loss
        }
        ranked = ranking(options.rule, better, freed, dense)
        if not ranked:
            break
        current = better[ranked[0]]
    return current
