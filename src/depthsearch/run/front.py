"""Several budgets of one run: from the configuration to front.json, and one point of it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from depthsearch import __version__
from depthsearch.config import BudgetConfig, FrontConfig
from depthsearch.errors import ConfigError, RunDirectoryError
from depthsearch.run.directory import BEST, FRONT, read_json
from depthsearch.run.points import FrontPoint
from depthsearch.space import Budget, Evaluation, SearchSpace, front_metrics, nondominated

if TYPE_CHECKING:
    from depthsearch.run.loop import Outcome

_BUDGET_KEYS = ("metric", "ratio", "cap", "drop")


def with_front(space: SearchSpace, front: FrontConfig | None) -> SearchSpace:
    """The space with the further budgets of the run file; raises BudgetError."""
    if front is None:
        return space
    budgets = (Budget.from_json(budget.to_budget_json()) for budget in front.budgets)
    return replace(space, front=tuple(budgets))


def front_json(
    space: SearchSpace,
    outcome: Outcome,
    repairs: Mapping[str, Mapping[str, Any]],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """What front.json holds: the answer at each budget, and what no mask beat in the search.

    `repairs` are described by mask; `about` says what the figures depend on.
    """
    metrics = tuple(dict.fromkeys((*front_metrics(space), *space.costs.metrics)))
    judges = {point.budget.metric: point for point in space.points}

    def costs(evaluation: Evaluation) -> dict[str, int]:
        mask = evaluation.mask
        return {
            metric: judges[metric].cost(mask)
            if metric in judges
            else space.costs.cost(metric, mask)
            for metric in metrics
        }

    answered = {answer.space.budget: answer for answer in outcome.front}
    rows = [
        (answer.finals.order[1], *(judges[m].cost(answer.best) for m in judges))
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
        "metrics": list(front_metrics(space)),
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
        **about,
    }


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
    if not (run / BEST).is_file():
        raise RunDirectoryError(
            f"{run} has no {BEST}: it has not finished; continue it with `depthsearch resume {run}`"
        )
    return read_json(run / FRONT, "it searched one budget; list others in the section front")


def find_point(run: Path, number: int | None, budget: str | None) -> dict[str, Any]:
    """The entry of front.json with a number, or at a budget such as "keep_params=0.8".

    Raises ConfigError for a budget that can't be read, RunDirectoryError for a point that is not
    there or has no mask.
    """
    front = read_front(run)
    points: list[dict[str, Any]] = front["points"]
    listed = "; ".join(f"{point['point']}: {point['budget_text']}" for point in points)
    if budget is not None:
        wanted = {key: parse_budget(budget)[key] for key in _BUDGET_KEYS}
        found = [p for p in points if {key: p["budget"][key] for key in _BUDGET_KEYS} == wanted]
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
        raise ConfigError(
            f"--budget {text}: {reason.removeprefix('Value error, ')}; give one of the budgets of "
            "the front, such as keep_params=0.8"
        ) from None
