"""The front of quality against cost: what no other mask beats in everything at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from depthsearch.errors import BudgetError
from depthsearch.space.budget import Budget
from depthsearch.space.evaluation import Evaluation, Status
from depthsearch.space.limit import Limit
from depthsearch.space.space import SearchSpace


def front_metrics(space: SearchSpace) -> tuple[str, ...]:
    """The metrics that the budgets of a space are counted in, the own one's first."""
    budgets = (space.budget, *space.front)
    return tuple(dict.fromkeys(metric for budget in budgets for metric in budget.metrics))


def front_limits(space: SearchSpace) -> dict[str, Limit]:
    """By metric of the budgets, a limit that tells costs in it; its cap is one of several."""
    found = {limit.metric: limit for point in space.points for limit in point.limits}
    return {metric: found[metric] for metric in front_metrics(space)}


@dataclass(frozen=True)
class Grid:
    """Budgets of two costs: the pairs that can be met, and the others with the reason."""

    budgets: tuple[Budget, ...]
    left_out: Mapping[Budget, str]


def budget_grid(space: SearchSpace, first: Sequence[Budget], second: Sequence[Budget]) -> Grid:
    """Every budget of `first`, and the space's own, together with every one of `second`.

    A second budget that the dense model meets leaves the first one alone. Raises BudgetError where
    no pair can be met.
    """
    base = replace(space, front=())
    found: dict[Budget, None] = {}
    left_out: dict[Budget, str] = {}
    for other in second:
        table = other.costs(space.costs, space.sites)
        free = other.cap_for(table) >= table.fixed + table.blocks
        for one in (space.budget, *first):
            budget = one if free else replace(one, also=other)
            try:
                replace(base, budget=budget)
            except BudgetError as error:
                left_out[budget] = str(error)
            else:
                found[budget] = None
    if not found:
        raise BudgetError(f"no pair of budgets of the front can be met: {[*left_out.values()][-1]}")
    found.pop(space.budget, None)
    return Grid(tuple(found), left_out)


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
    limits = front_limits(space).values()
    rows = [(e.order[1], *(limit.cost(e.mask) for limit in limits)) for e in known]
    return tuple(known[place] for place in nondominated(rows))


def hypervolume(rows: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The volume that the rows dominate below the reference point; lower is better in each column.

    Exact, by slices along the last column. Values
    for one reference point can be compared, others can't.
    """
    inside = [tuple(row) for row in rows if all(a < b for a, b in zip(row, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(row[0] for row in inside)
    inside.sort(key=lambda row: row[-1])
    levels = [*(row[-1] for row in inside), reference[-1]]
    return sum(
        (above - level) * hypervolume([row[:-1] for row in inside[:count]], reference[:-1])
        for count, (level, above) in enumerate(pairwise(levels), start=1)
        if above > level
    )
