"""What a search had found at each cost: its best-so-far masks, and what they are worth.

Best so far is by the search's own loss; what the masks are worth is measured on held-out text
afterwards, and is no part of what the search spent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthsearch.run.statistics import Interval, bootstrap_interval
from depthsearch.space import Status


@dataclass(frozen=True)
class Improvement:
    """A mask on budget that was better on search data than all before it, and when it was known."""

    cost_tokens: float
    loss: float
    mask: str
    origin: str


def improvements(records: Sequence[Mapping[str, Any]]) -> list[Improvement]:
    """The best mask so far after each ask of a journal that brought a better one."""
    found: list[Improvement] = []
    asked: dict[int, Mapping[str, str]] = {}
    for record in records:
        if record["op"] == "ask":
            final = (proposal for proposal in record["proposals"] if proposal["final"])
            asked[record["id"]] = {proposal["mask"]: proposal["origin"] for proposal in final}
        elif record["op"] == "tell":
            origins = asked[record["id"]]
            best = min(
                (
                    (evaluation["loss"], evaluation["mask"])
                    for evaluation in record["evaluations"]
                    if evaluation["mask"] in origins and evaluation["status"] == Status.OK
                ),
                default=None,
            )
            if best is not None and (not found or best[0] < found[-1].loss):
                loss, mask = best
                found.append(Improvement(record["cost_tokens"], loss, mask, origins[mask]))
    return found


def spaced(found: Sequence[Improvement], most: int) -> list[Improvement]:
    """At most `most` of the improvements: what was best at costs spaced evenly in the logarithm.

    The first and the last are among them; with `most` 1 the last alone.
    """
    if len(found) <= most:
        return list(found)
    if most < 2:
        return list(found[-1:]) if most else []
    low, high = (math.log(max(entry.cost_tokens, 1.0)) for entry in (found[0], found[-1]))
    places = {0, len(found) - 1}
    for step in range(1, most - 1):
        target = math.exp(low + (high - low) * step / (most - 1))
        places.add(sum(entry.cost_tokens <= target for entry in found) - 1)
    return [found[place] for place in sorted(places)]


@dataclass(frozen=True)
class Step:
    """From a cost on, the best mask by search loss, or the answer: held-out losses by window."""

    cost_tokens: float
    losses: Sequence[float]


def course(runs: Sequence[Sequence[Step]], rng: np.random.Generator) -> dict[str, Any]:
    """Held-out loss of one arm against cost, from the steps of each of its seeds, by rising cost.

    The last step of each seed is its answer, which the finals chose on fresh text; the others are
    what was best so far by search loss. A point stands wherever a seed has a new mask, from where
    every seed has one, with an interval over seeds and windows. `worsened` names the earlier point
    from which most was lost to the last before the answers, paired by seed and window; None where
    no such loss is above zero at 95 %, a level that all earlier points share (Bonferroni).
    """
    costs, tables = _tables(runs)
    points = []
    for cost, table in zip(costs, tables, strict=True):
        found = bootstrap_interval(table, rng)
        points.append(
            {
                "cost_tokens": cost,
                "heldout_kl_mean": found.mean,
                "heldout_kl_low": found.low,
                "heldout_kl_high": found.high,
            }
        )
    searched = [steps[:-1] for steps in runs]
    worsened = _worsened(*_tables(searched), rng) if all(searched) else None
    return {"points": points, "worsened": worsened}


def _tables(runs: Sequence[Sequence[Step]]) -> tuple[list[float], list[np.ndarray]]:
    """The costs at which a seed has a new mask, and losses `[seed, window]` from there on."""
    start = max(steps[0].cost_tokens for steps in runs)
    costs = sorted({max(start, step.cost_tokens) for steps in runs for step in steps})
    tables = []
    for cost in costs:
        reached = [[s for s in steps if s.cost_tokens <= cost][-1] for steps in runs]
        tables.append(np.array([step.losses for step in reached]))
    return costs, tables


def _worsened(
    costs: Sequence[float], tables: Sequence[np.ndarray], rng: np.random.Generator
) -> dict[str, float] | None:
    if len(tables) < 2:
        return None
    level = 1 - 0.05 / (len(tables) - 1)
    lost: list[tuple[float, Interval]] = [
        (cost, bootstrap_interval(tables[-1] - table, rng, level))
        for cost, table in zip(costs[:-1], tables[:-1], strict=True)
    ]
    shown = [entry for entry in lost if entry[1].side > 0]
    if not shown:
        return None
    cost, worst = max(shown, key=lambda entry: entry[1].mean)
    return {"cost_tokens": cost, "difference": worst.mean, "low": worst.low, "high": worst.high}
