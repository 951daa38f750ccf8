"""Masks put together from single gaps whose losses are taken to add up.

Each gap is measured alone, then an exact knapsack (as in LAPTOP-Diff and Puzzle, but over runs of
sublayers instead of single ones) says which of them together free the budget at the lowest summed
loss. Gaps hurt each other, so the sum is only where a search begins; repaired gaps do so less.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from depthsearch.searchers.protocol import propose
from depthsearch.searchers.ranking import price
from depthsearch.searchers.staged import Answers
from depthsearch.space import Batch, Mask, Proposal, SearchSpace, Status

GAPS = "gaps added up"

_PENALTIES = (0.0, 0.25, 0.5, 1.0)
_FRONT = 400


@dataclass(frozen=True)
class Gap:
    """One run of dropped sites `[start, stop)`: the budget it frees, and its loss alone."""

    start: int
    stop: int
    freed: int
    loss: float


def gap_plan(
    space: SearchSpace, longest: int, singles: Answers
) -> Generator[Batch, Answers, tuple[Gap, ...]]:
    """Measure gaps of up to `longest` sites; `singles` are the shortest ones and the dense model.

    Of each length only the better half, by loss for the budget freed, is made longer.
    """
    dense = singles.get(space.dense)
    base = dense.loss if dense is not None and dense.loss is not None else 0.0
    found: dict[Mask, Gap] = {}
    answers = singles
    while True:
        fresh = {}
        for mask, evaluation in answers.items():
            if len(space.gaps(mask)) == 1 and evaluation.status is Status.OK:
                assert evaluation.loss is not None
                ((start, stop),) = space.gaps(mask)
                freed = space.cost(space.dense) - space.cost(mask)
                fresh[mask] = Gap(start, stop, freed, evaluation.loss - base)
        found |= fresh
        prices = {mask: price(gap.loss, gap.freed) for mask, gap in fresh.items()}
        ranked = sorted(fresh, key=lambda mask: (prices[mask], mask.key))
        longer: dict[Mask, None] = {}
        for mask in ranked[: -(-len(ranked) // 2)]:
            for more in space.removals(mask):
                ((start, stop), *others) = space.gaps(more)
                if not others and stop - start <= longest and more not in found:
                    longer[more] = None
        if not longer:
            return tuple(found.values())
        answers = yield Batch(tuple(propose(space, mask, "gap") for mask in longer))


def added_up(
    space: SearchSpace, gaps: Sequence[Gap], keys: Sequence[float]
) -> tuple[Proposal, ...]:
    """Masks on budget from gaps with the lowest summed losses.

    The first is the exact optimum of the sum; the others pay a growing price for every gap, since
    several hurt more than their sum. `keys` (one a gene, higher is kept) fill what is left over.
    """
    need = space.cost(space.dense) - space.cap
    stacks = [start for start, _ in space.gaps(space.dense.without(range(len(space.sites))))]
    masks: dict[Mask, None] = {}
    price = 0.0
    for penalty in _PENALTIES:
        chosen = cheapest(gaps, need, penalty * price, stacks)
        if chosen is None:
            break
        if penalty == 0.0:
            price = max(0.0, sum(gap.loss for gap in chosen) / max(1, len(chosen)))
        mask = space.dense.without([i for gap in chosen for i in range(gap.start, gap.stop)])
        masks[space.fill(mask, keys)] = None
    return tuple(Proposal(mask, GAPS) for mask in masks if space.on_budget(mask))


def cheapest(
    gaps: Sequence[Gap], need: int, price: float = 0.0, stacks: Sequence[int] = ()
) -> tuple[Gap, ...] | None:
    """The gaps, none touching another, that free `need` at the lowest sum of losses and prices.

    Where one of `stacks` begins, a gap may touch the one before it: each is in a stack of its own.
    Dynamic programming from the last site back over what is freed (capped at `need`) and lost; None
    where all gaps together free too little.
    """
    starts: dict[int, list[Gap]] = {}
    for gap in gaps:
        starts.setdefault(gap.start, []).append(gap)
    end = max((gap.stop for gap in gaps), default=0)
    # fronts[site]: what can be had from there on, as (freed, loss, gaps), none beaten by another.
    fronts: dict[int, list[tuple[int, float, tuple[Gap, ...]]]] = {end: [(0, 0.0, ())]}
    fronts[end + 1] = fronts[end]
    for site in range(end - 1, -1, -1):
        options = list(fronts[site + 1])
        for gap in starts.get(site, ()):
            after = gap.stop if gap.stop == end or gap.stop in stacks else gap.stop + 1
            options += [
                (min(need, freed + gap.freed), loss + gap.loss + price, (gap, *rest))
                for freed, loss, rest in fronts[after]
            ]
        fronts[site] = _front(options)
    best = [(loss, rest) for freed, loss, rest in fronts[0] if freed >= need]
    return min(best, key=lambda option: option[0])[1] if best else None


def _front(
    options: list[tuple[int, float, tuple[Gap, ...]]],
) -> list[tuple[int, float, tuple[Gap, ...]]]:
    """What is not beaten in both what it frees and what it loses, thinned evenly if too many."""
    kept: list[tuple[int, float, tuple[Gap, ...]]] = []
    for option in sorted(options, key=lambda o: (-o[0], o[1])):
        if not kept or option[1] < kept[-1][1]:
            kept.append(option)
    if len(kept) > _FRONT:
        step = (len(kept) - 1) / (_FRONT - 1)
        kept = [kept[round(place * step)] for place in range(_FRONT)]
    return kept
