"""The runs of a comparison: each arm with each seed at each budget, and where each is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from depthsearch.config import BudgetConfig, CompareConfig, RunConfig, SearchConfig


@dataclass(frozen=True)
class ArmRun:
    """One run of a comparison; `place` is that of its budget among those compared."""

    arm: str
    seed: int
    place: int
    budget: str | None
    """the label of its budget, None where there is only one"""

    @property
    def name(self) -> str:
        """The name of its directory."""
        return "-".join((self.arm, *((self.budget,) if self.budget else ()), f"seed{self.seed}"))

    @property
    def title(self) -> str:
        """The arm as it is shown while one waits, with its budget where there are several."""
        return f"{self.budget} {self.arm}" if self.budget else self.arm


def budgets_of(config: RunConfig) -> tuple[BudgetConfig, ...]:
    """The budgets that are compared: that of the space where none are named."""
    budgets = config.compare.budgets if config.compare is not None else ()
    return budgets or (config.space.budget,)


def arm_runs(compare: CompareConfig, order: Sequence[str] | None = None) -> list[ArmRun]:
    """Every run, budget by budget and seed by seed, arms as configured or in another `order`."""
    labels: list[str | None] = [budget.label for budget in compare.budgets]
    if len(labels) < 2:
        labels = [None]
    return [
        ArmRun(arm, seed, place, label)
        for place, label in enumerate(labels)
        for seed in compare.seeds
        for arm in order or compare.arms
    ]


def cost_first(compare: CompareConfig) -> list[str]:
    """The arms, the one whose cost the others get first."""
    first = [arm for arm in compare.arms if arm == compare.cost_tokens]
    return first + [arm for arm in compare.arms if arm not in first]


def arm_search(config: RunConfig, run: ArmRun, equal: float | None) -> SearchConfig:
    """The search of a run; `equal` is what the arm spent that sets the cost, if any does."""
    assert config.compare is not None
    limit = config.compare.cost_tokens
    if limit is None:
        cost = config.search.cost_tokens
    elif isinstance(limit, str):
        cost = None if run.arm == limit else equal
    else:
        cost = limit
    arm = config.compare.arms[run.arm]
    chosen = arm.model_copy(update={"seed": run.seed, "cost_tokens": cost})
    if chosen.options.get("storage") is None:
        return chosen
    # Every run keeps a study of its own in a storage that they share.
    name = f"{chosen.options.get('study_name', 'depthsearch')}-{run.name}"
    return chosen.model_copy(update={"options": chosen.options | {"study_name": name}})


def arm_config(config: RunConfig, run: ArmRun, chosen: SearchConfig) -> RunConfig:
    """The configuration of a run by itself."""
    space = config.space.model_copy(update={"budget": budgets_of(config)[run.place]})
    return config.model_copy(update={"search": chosen, "compare": None, "space": space})
