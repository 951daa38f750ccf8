"""Searches of a run file: one, or several side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
)

from depthsearch.config.budgets import BudgetConfig
from depthsearch.config.section import Count, Section, Whole, frozen

Repair = Literal["none", "table", "gap", "sequential"]
Finish = Literal["none", "gap", "sequential"]
Loss = Literal["kl", "cross_entropy", "angular", "norm", "js", "chrf"]

_NAME = re.compile(r"[^\W_][\w .+,=()-]*")
_DENSE = "dense model"
"""What tables call the row of the model itself."""
_LONGEST_NAME = 150
"""Bytes of an arm's name: folders hold 255, and a seed and a budget follow."""

_FINALISTS = 16
_DEAR_FINALISTS = 8
"""Where each is fitted on far more text than it is judged on, or every budget has its own."""


def _mapped(value: object) -> object:
    """Let `racing: true` and `false` stand for the default race and for none."""
    if isinstance(value, bool):
        return {} if value else {"method": "none"}
    if isinstance(value, Mapping | RacingConfig):
        return value
    raise ValueError("must be true, false, or a mapping such as {method: paired, error_rate: 0.05}")


def _named(name: str) -> str:
    """Refuse the name of an arm that can't be a part of a folder's name, or is taken."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            "must begin with a letter or digit and go on with letters, digits, spaces and "
            "_ . + - , = ( ), since it names folders"
        )
    if name == _DENSE:
        raise ValueError("is what tables call the model itself: choose another name")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"must have at most {_LONGEST_NAME} bytes, since it names folders")
    return name


class RacingConfig(Section):
    """How candidates that a search need not know exactly are stopped early."""

    method: Literal["paired", "halving", "none"] = "paired"
    """paired stops a candidate once it is worse with confidence than as many masks as matter;
    halving keeps a share of the best at each rung, whatever they differ by; none stops nobody"""
    error_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """paired: probability that a race loses a mask which is among the best on all search text"""
    eta: Annotated[Whole, Field(ge=2)] = 2
    """halving: one candidate in so many goes on, to so many times as much text"""

    def __bool__(self) -> bool:
        return self.method != "none"


class SearchConfig(Section):
    """Which searcher, from which seed, and how much it may spend."""

    method: Annotated[str, Field(min_length=1)] = "surrogate"
    """name of the searcher"""
    seed: Annotated[Whole, Field(ge=0)] = 0
    """everything random follows from it"""
    cost_tokens: Annotated[float, Field(gt=0)] | None = None
    """budget in dense-equivalent tokens: one is a token through the whole dense model"""
    max_evaluations: Count | None = None
    """budget in candidates judged"""
    patience: Count | None = None
    """end when so many candidates on budget in a row were judged without one that is better"""
    finalists: Count | None = None
    """candidates ranked again on fresh text at the end; left out: 16, or 8 where each
    is repaired or there are several budgets"""
    score: Loss | None = None
    """what masks are compared by in the search, as in objective.kind, which still ranks the
    finalists; left out: the same"""
    racing: Annotated[RacingConfig, BeforeValidator(_mapped)] = RacingConfig()
    """stop judging a candidate once it can't win any more: true, false, or a mapping such as
    {method: paired, error_rate: 0.05}"""
    batch: Count | None = None
    """candidates asked for at once; the searcher's own choice when left out"""
    repair: Repair = "none"
    """what is refitted before a mask is judged: nothing; the output projection before each gap,
    once in a search for each gap and then looked up (table), or for each mask anew (gap); or also
    every projection after the first gap (sequential)"""
    finish: Finish | None = None
    """the same for the finalists and the result; left out: as in the search, gap for table"""
    toward_text: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """how far what finalists and result are fitted to leans from the dense model toward what
    predicts the fit text: by so many nats a token, to first order. More than 0 adapts the result
    to that kind of text"""
    options: dict[str, Any] = Field(default_factory=dict)
    """settings of the searcher itself"""

    def finalists_of(self, budgets: int = 1) -> int:
        """How many finalists each of so many budgets has."""
        if self.finalists is not None:
            return self.finalists
        return _FINALISTS if self.finished == "none" and budgets == 1 else _DEAR_FINALISTS

    @property
    def finished(self) -> Finish:
        """How the finalists and the result are repaired."""
        if self.finish is None:
            return "gap" if self.repair == "table" else self.repair
        return self.finish


class CompareConfig(Section):
    """Several searchers side by side at equal cost, each with several seeds."""

    arms: Annotated[dict[Annotated[str, AfterValidator(_named)], SearchConfig], Field(min_length=1)]
    """name of the arm: what it changes in `search`"""
    seeds: Annotated[
        tuple[Annotated[Whole, Field(ge=0)], ...], Field(min_length=1), BeforeValidator(frozen)
    ] = (0, 1, 2)
    """each arm runs once with each seed"""
    budgets: tuple[BudgetConfig, ...] = ()
    """each arm and seed runs once at each of these budgets, such as [{keep_params: 0.875},
    {keep_kv_bytes: 0.6}]; left out: at space.budget, whose `of` and `context_tokens` do not hold
    for these: a ratio is of the whole model unless it says `of: blocks`"""
    cost_tokens: float | str | None = None
    """what each arm may spend, or the arm whose own cost the others get, at each budget and with
    each seed anew; else search.cost_tokens"""
    anytime: Annotated[Whole, Field(ge=0)] = 6
    """best-so-far masks of each run, spaced in log cost, that are measured on held-out text to show
    what it was worth to stop earlier; 0 measures none"""

    @field_validator("budgets", mode="before")
    @classmethod
    def _check_list(cls, budgets: object) -> object:
        if not isinstance(budgets, list | tuple):
            raise ValueError("must be a list, such as [{keep_params: 0.875}, {keep_params: 0.75}]")
        return tuple(budgets)

    @field_validator("budgets", mode="after")
    @classmethod
    def _check_budgets(cls, budgets: tuple[BudgetConfig, ...]) -> tuple[BudgetConfig, ...]:
        if len({budget.label for budget in budgets}) != len(budgets):
            raise ValueError("each budget may appear once")
        return budgets

    @field_validator("seeds", mode="after")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("each seed may appear once")
        return seeds

    @field_validator("cost_tokens", mode="before")
    @classmethod
    def _check_cost(cls, value: object, info: ValidationInfo) -> object:
        arms = list(info.data.get("arms", ()))
        if value is None or (isinstance(value, str) and (value in arms or not arms)):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"must be a number above 0 or the name of an arm: {', '.join(arms)}")
        try:
            return float(value)
        except OverflowError:
            raise ValueError("must be a number that a float can hold") from None
