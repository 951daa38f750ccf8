"""Greedy iterative removal: drop what hurts least, measure again, until the budget is met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from depthsearch.searchers.protocol import propose
from depthsearch.searchers.ranking import (
    freed_cost,
    influence_keys,
    loss_increases,
    price,
    removal_keys,
)
from depthsearch.searchers.staged import Plan
from depthsearch.space import Batch, Evaluation, Hints, Mask, Proposal, SearchSpace


@dataclass(frozen=True)
class GreedyOptions:
    """`plain` takes the lowest loss (SLEB, BlockPruner, FinerCut).

    `cost_aware` takes the least loss increase per unit of budget freed.
    """

    rule: Literal["cost_aware", "plain"] = "cost_aware"


def greedy_plan(
    space: SearchSpace, hints: Hints, rng: np.random.Generator, options: GreedyOptions
) -> Plan:
    """One batch a step: every mask one unit smaller, those that meet the budget filled up to it.

    Candidates whose evaluation failed are passed over; a step in which all fail ends the search.
    """
    mask, loss = space.dense, 0.0
    dense: Evaluation | None = None
    keys = influence_keys(space, hints)
    aware = options.rule == "cost_aware"
    if aware or space.fits(mask):
        answers = yield Batch((propose(space, mask, "greedy dense"),))
        dense = answers.get(mask)
        loss = dense.loss or 0.0 if dense is not None else 0.0
    step = 0
    while not space.fits(mask):
        step += 1
        candidates = _candidates(space, mask, keys)
        if not candidates:
            # Pairs can run out above the cap where a repair that starts over still finds a way.
            yield Batch((Proposal(space.repair(mask, rng), f"greedy repair {step}"),))
            return
        # A race compares losses only, which decides a step where every candidate frees the same.
        race = not aware or len(set(candidates.values())) == 1
        answers = yield Batch(
            tuple(propose(space, target, f"greedy step {step}") for target in candidates),
            1 if race else None,
        )
        scores = {
            target: (
                0 if evaluation.order[0] == 0 else 1,
                price(evaluation.loss - loss, candidates[target]) if aware else evaluation.loss,
                target.key,
            )
            for target, evaluation in answers.items()
            if evaluation.loss is not None
        }
        if not scores:
            return
        if step == 1:
            keys = removal_keys(space, loss_increases(space, answers.values(), dense), keys)
        mask = min(scores, key=lambda target: scores[target])
        loss = answers[mask].loss or 0.0


def _candidates(space: SearchSpace, mask: Mask, keys: tuple[float, ...]) -> Mapping[Mask, int]:
    """The masks of one step and the budget that each frees."""
    found: dict[Mask, int] = {}
    for smaller in space.removals(mask):
        target = space.fill(smaller, keys) if space.fits(smaller) else smaller
        found[target] = freed_cost(space, mask, target)
    return found
