"""Several budgets of one run: from the configuration to front.json, and one point of it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from depthsearch import __version__
from depthsearch.config import BudgetConfig, FrontConfig
from depthsearch.errors import ConfigError, RunDirectoryError
from depthsearch.run.directory import BEST, FRONT, check_run_directory, read_json, understood
from depthsearch.run.points import FrontPoint
from depthsearch.space import (
    Budget,
    Evaluation,
    Grid,
    SearchSpace,
    budget_grid,
    front_limits,
    hypervolume,
    nondominated,
)

if TYPE_CHECKING:
    from depthsearch.run.loop import Outcome

_BUDGET_KEYS = ("metric", "ratio", "cap", "drop")


def with_front(space: SearchSpace, front: FrontConfig | None) -> SearchSpace:
    """The space with the further budgets of the run file; raises BudgetError."""
    return space if front is None else replace(space, front=front_grid(space, front).budgets)


def front_grid(space: SearchSpace, front: FrontConfig) -> Grid:
    """The further budgets of the run file, and which pairs of them can't be met.

    Raises BudgetError where no pair can be.
    """
    first, second = (
        tuple(Budget.from_json(budget.to_budget_json()) for budget in budgets)
        for budgets in (front.budgets, front.second)
    )
    return budget_grid(space, first, second) if second else Grid(first, {})


def front_json(
    space: SearchSpace,
    outcome: Outcome,
    repairs: Mapping[str, Mapping[str, Any]],
    about: Mapping[str, Any],
    left_out: Mapping[Budget, str] | None = None,
) -> dict[str, Any]:
    """What front.json holds: the answer at each budget, and what no mask beat in the search.

    `repairs` are described by mask; `about` says what the figures depend on; `left_out` are pairs
    of budgets that can't be met, with the reason.
    """
    limits = front_limits(space)
    others = [metric for metric in space.costs.metrics if metric not in limits]

    def costs(evaluation: Evaluation) -> dict[str, int]:
        mask = evaluation.mask
        return {metric: limit.cost(mask) for metric, limit in limits.items()} | {
            metric: space.costs.cost(metric, mask) for metric in others
        }

    answered = {answer.space.budget: answer for answer in outcome.front}
    rows = [
        (answer.finals.order[1], *(limit.cost(answer.best) for limit in limits.values()))
        for answer in outcome.front
    ]
    kept = {outcome.front[place].space.budget for place in nondominated(rows)}
    points = []
    for number, point in enumerate(space.points, start=1):
        entry: dict[str, Any] = {
            "point": number,
            "own": point.budget == space.budget,
            "budget": point.budget.to_json(),
            "budget_text": point.budget.text,
            "metric": point.budget.metric,
            "cap": point.cap,
            "dense_cost": point.cost(point.dense),
            "limits": [
                {"metric": limit.metric, "cap": limit.cap, "dense_cost": limit.dense}
                for limit in point.limits
            ],
        }
        answer = answered.get(point.budget)
        if answer is None:
            points.append(entry | {"mask": None})
            continue
        repair = repairs.get(answer.best.key)
        points.append(
            entry
            | _answer_json(answer)
            | {
                "dominated": point.budget not in kept,
                "costs": costs(answer.finals),
                "repair": None if repair is None else dict(repair),
            }
        )
    return {
        "version": __version__,
        "metrics": list(limits),
        "dense_costs": costs(Evaluation(space.dense, (), 0)),
        "points": points,
        "archive": [
            {
                "mask": evaluation.mask.key,
                "origin": origin,
                "loss": evaluation.loss,
                "stderr": evaluation.stderr,
                "costs": costs(evaluation),
            }
            for evaluation, origin in outcome.archive
        ],
        "hypervolume": _hypervolume(space, outcome),
        "left_out": [
            {"budget": budget.to_json(), "budget_text": budget.text, "reason": reason}
            for budget, reason in (left_out or {}).items()
        ],
        **about,
    }


def _hypervolume(space: SearchSpace, outcome: Outcome) -> dict[str, Any]:
    """What the archive dominates, as a share of the box that it is measured in.

    The box reaches from no loss and no cost to the dense costs and the highest search loss of an
    answer; only values with the same `reference` can be compared.
    """
    limits = front_limits(space)
    most = max(answer.search.loss or 0.0 for answer in outcome.front)
    reference = {"loss": most} | {m: max(1, limit.dense) for m, limit in limits.items()}
    rows = [(e.loss or 0.0, *(x.cost(e.mask) for x in limits.values())) for e, _ in outcome.archive]
    scaled = [
        [a / (b or 1.0) for a, b in zip(row, reference.values(), strict=True)] for row in rows
    ]
    return {"reference": reference, "share": hypervolume(scaled, [1.0] * len(reference))}


def _answer_json(answer: FrontPoint) -> dict[str, Any]:
    """One answer with its losses, and how far it is ahead of the best baseline."""
    space, mask, baseline, lead = answer.space, answer.best, answer.baseline, answer.lead
    return {
        "mask": mask.key,
        "dropped": [space.sites[i].name for i in mask.dropped],
        "kept": [space.sites[i].name for i in mask.kept],
        "origin": answer.origin,
        "cost": space.cost(mask),
        "loss": answer.search.loss,
        "stderr": answer.search.stderr,
        "finals_loss": answer.finals.loss,
        "finals_stderr": answer.finals.stderr,
        "baseline": None if baseline is None else baseline.mask.key,
        "baseline_finals_loss": None if baseline is None else baseline.loss,
        "lead": None if lead is None else lead[0],
        "lead_stderr": None if lead is None else lead[1],
    }


def read_front(run: Path) -> dict[str, Any]:
    """front.json of a finished run; raises RunDirectoryError where it has none."""
    check_run_directory(run)
    if not (run / BEST).is_file():
        raise RunDirectoryError(
            f"{run} has no {BEST}: it has not finished; continue it with `depthsearch resume {run}`"
        )
    front = read_json(run / FRONT, "it searched one budget; list others in the section front")
    with understood(run / FRONT):
        known = {"point", "budget", "budget_text", "mask", "own"}
        if not all(known <= point.keys() for point in front["points"]):
            raise ValueError("a point lacks what is known of each")
    return front


def find_point(run: Path, number: int | None, budget: str | None) -> dict[str, Any]:
    """The entry of front.json with a number, or at a budget such as "keep_params=0.8".

    A pair is given as "keep_params=0.8,keep_kv_bytes=0.6", in any order.
    Raises ConfigError for a budget that can't be read, RunDirectoryError for a point that is not
    there or has no mask.
    """
    front = read_front(run)
    points: list[dict[str, Any]] = front["points"]
    listed = "; ".join(f"{point['point']}: {point['budget_text']}" for point in points)
    if budget is not None:
        wanted = _caps(parse_budget(part) for part in budget.split(","))
        found = [
            point
            for point in points
            if _caps(part.to_json() for part in Budget.from_json(point["budget"]).parts) == wanted
        ]
        what = f"point at {budget}"
    else:
        found = [point for point in points if point["point"] == number]
        what = f"point {number}"
    if len(found) != 1:
        which = "several points" if found else "no " + what
        hint = "give --point N" if found else "choose one"
        raise RunDirectoryError(f"{run / FRONT} has {which} ({listed}): {hint}")
    if found[0]["mask"] is None:
        raise RunDirectoryError(
            f"the search found no mask for {what} of {run}: search again with more cost_tokens"
        )
    return found[0]


def _caps(parts: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """What budgets allow, whatever their order; a ratio may be of the model or of its blocks."""
    found = [[part[key] for key in _BUDGET_KEYS] for part in parts]
    return sorted(found, key=lambda caps: str(caps[0]))


def parse_budget(text: str) -> dict[str, Any]:
    """A budget such as "keep_params=0.8" or "keep_bytes=180MB", as `Budget.to_json` gives it.

    What a ratio refers to is left at its default. Raises ConfigError.
    """
    key, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError("expected key=value")
        return BudgetConfig(**{key.strip(): yaml.safe_load(value)}).to_budget_json()
    except (ValidationError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        reason = " ".join(reason.removeprefix("Value error, ").split())
        raise ConfigError(
            f"--budget {text}: {reason}; give one of the budgets of "
            "the front, such as keep_params=0.8, or a pair such as "
            "keep_params=0.8,keep_kv_bytes=0.6"
        ) from None
