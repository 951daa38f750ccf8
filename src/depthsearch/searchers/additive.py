"""Single removals taken to add up: the mask on budget with the smallest sum.

What a layer's removal costs alone is taken for what it costs among others, as in LAPTOP-Diff
(arXiv 2404.11098) and Puzzle (arXiv 2411.19146), which turns the search into a knapsack. Removals
hurt each other, so the loss comes out higher than the sum; every proposal names its own sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from depthsearch.searchers.knapsack import Removal, cheapest_choices
from depthsearch.searchers.oneshot import rank_removals, removal_sweep
from depthsearch.searchers.options import at_least
from depthsearch.searchers.ranking import Unit, drop_in_order, loss_increases, per_cost
from depthsearch.searchers.staged import Answers, Plan
from depthsearch.space import Batch, Hints, Mask, Proposal, SearchSpace, Status

ADDITIVE = "additive"

_SPARE = 3
"""Masks that take the place of proposals whose evaluations all failed."""


@dataclass(frozen=True)
class AdditiveOptions:
    """`improve` more masks are measured after the best, in the order of their predicted sums.

    Their losses correct no prediction; the best of them by loss is what the search ends with.
    """

    improve: int = 0

    def __post_init__(self) -> None:
        at_least(self, improve=0)


def additive_plan(space: SearchSpace, hints: Hints, options: AdditiveOptions) -> Plan:
    """Measure every single removal, solve the knapsack, propose its solutions."""
    if space.fits(space.dense):
        yield Batch((Proposal(space.dense, f"{ADDITIVE}, nothing to drop"),))
        return
    answers = yield removal_sweep(space)
    proposals = additive_masks(space, hints, answers, 1 + options.improve + _SPARE)
    asked = 0
    found = False
    for size in (1, options.improve, *(1,) * _SPARE):
        batch = proposals[asked : asked + size]
        asked += size
        if batch and (not found or asked <= 1 + options.improve):
            answers = yield Batch(batch)
            found = found or any(e.status.has_loss for e in answers.values())


def additive_masks(
    space: SearchSpace, hints: Hints, answers: Answers, count: int = 1
) -> tuple[Proposal, ...]:
    """The `count` masks on budget with the smallest sums of loss increases, by a sweep's answers.

    A removal without a loss is never part of one. Where costs are shared between sites that go
    separately, or the removals with a loss don't suffice, the one mask that drops in order of loss
    increase per cost instead; its origin says so.
    """
    dense = answers.get(space.dense)
    known = [e for e in answers.values() if e.status in (Status.OK, Status.ELIMINATED)]
    if dense is None or dense.loss is None:
        reason = "no loss of the dense model"
    elif not adds_up(space):
        reason = "shared costs"
    else:
        increases = loss_increases(space, known, dense)
        units = tuple(sorted(increases))
        need = space.cost(space.dense) - space.cap
        choices, proven = cheapest_choices(removals(space, units, increases), need, count)
        found: dict[Mask, str] = {}
        for place, choice in enumerate(choices, start=1):
            name = ADDITIVE if place == 1 else f"{ADDITIVE} {place}"
            name += "" if proven else ", best found"
            mask = space.dense.without([i for r in choice.taken for i in units[r]])
            found[mask] = f"{name}, predicted {choice.increase:+.3f}"
        if found:
            return tuple(Proposal(mask, origin) for mask, origin in found.items())
        reason = "no exact solution"
    ranking = rank_removals(space, hints, answers)
    mask = drop_in_order(space, ranking.by_cost, per_cost(space, ranking.keys))
    return (Proposal(mask, f"{ADDITIVE}, in order per cost ({reason})"),)


def adds_up(space: SearchSpace) -> bool:
    """Whether what several units free is the sum of what each frees alone.

    Not so where a cost is shared by sites that are dropped separately; where one of them is never
    dropped, or all of them always go together, sharing makes no difference.
    """
    together = [] if _in_pairs(space) else [set(gene) for gene in space.genes]
    shared = space.budget.costs(space.costs, space.sites).shared
    return all(
        amount == 0
        or len(indices) == 1
        or not space.free.issuperset(indices)
        or any(gene.issuperset(indices) for gene in together)
        for indices, amount in shared
    )


def removals(
    space: SearchSpace, units: Sequence[Unit], increases: Mapping[Unit, float]
) -> tuple[Removal, ...]:
    """The units as the knapsack takes them: genes by number, or pairs of sites by index.

    Sites of different stacks never touch: a stack's places begin one further on.
    """
    dense = space.cost(space.dense)

    def freed(sites: Sequence[int]) -> int:
        return dense - space.cost(space.dense.without(sites))

    if not _in_pairs(space):
        number = {gene: place for place, gene in enumerate(space.genes)}
        return tuple(
            Removal(number[unit], number[unit] + 1, freed(unit), 0, increases[unit])
            for unit in units
        )
    stacks = list(dict.fromkeys(site.stack for site in space.sites))
    found = []
    for unit in units:
        a, b = unit
        start = a + stacks.index(space.sites[a].stack)
        found.append(Removal(start, start + 2, freed([a]), freed([b]), increases[unit]))
    return tuple(found)


def _in_pairs(space: SearchSpace) -> bool:
    return space.packable and space.granularity == "sublayer"
