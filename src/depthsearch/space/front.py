"""The front of quality against cost: what no other mask beats in everything at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from depthsearch.space.evaluation import Evaluation, Status
from depthsearch.space.space import SearchSpace


def front_metrics(space: SearchSpace) -> tuple[str, ...]:
    """The metrics that the budgets of a space are counted in, the own one's first."""
    return tuple(dict.fromkeys(budget.metric for budget in (space.budget, *space.front)))


def nondominated(rows: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Places of the rows that no other row beats, lowest first column first; lower is better.

    One row beats another that is nowhere lower and somewhere higher (Pareto dominance). Of equal
    rows the first stays.
    """
    found: list[int] = []
    for place in sorted(range(len(rows)), key=lambda i: (tuple(rows[i]), i)):
        # In lexicographic order nothing behind a row can beat it.
        if not any(
            all(a <= b for a, b in zip(rows[kept], rows[place], strict=True)) for kept in found
        ):
            found.append(place)
    return tuple(found)


def front_of(space: SearchSpace, evaluations: Iterable[Evaluation]) -> tuple[Evaluation, ...]:
    """The complete evaluations that none beats in loss and in the cost of every budget's metric.

    Masks on no budget count as well: what was measured on the way is part of the trade-off.
    """
    known = sorted((e for e in evaluations if e.status is Status.OK), key=lambda e: e.order)
    judges = {point.budget.metric: point.cost for point in space.points}
    rows = [(e.order[1], *(cost(e.mask) for cost in judges.values())) for e in known]
    return tuple(known[place] for place in nondominated(rows))
