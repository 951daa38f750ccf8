"""A backend whose losses are a plain function of the mask, and searches over it in one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tests.searchers.landscapes import Landscape, toy

from depthsearch.evaluation import UnitResult, executed_sites
from depthsearch.journal import Journal
from depthsearch.run.ledger import Ledger, OnRecord
from depthsearch.run.loop import OnProgress, Outcome, SearchLoop
from depthsearch.run.planning import Plan
from depthsearch.space import Hints, Mask, SearchSpace, Sensitivity, Status

WINDOW_TOKENS = 8

Failing = Callable[[Mask], Status]


def never(_mask: Mask) -> Status:
    return Status.OK


@dataclass
class Synthetic:
    """Losses of `Landscape` with noise drawn anew for each sequence; a site costs one.

    A site behind the first gap of a mask costs `behind` besides, as where gaps are repaired.
    """

    landscape: Landscape
    seed: int = 0
    batches: int = 5
    rows: int = 2
    failing: Failing = never
    behind: float = 0.0
    units: Counter[tuple[int, Mask]] = field(default_factory=Counter)
    charged: float = 0.0

    @property
    def sequences(self) -> tuple[int, ...]:
        return (self.rows,) * self.batches

    @property
    def window_tokens(self) -> int:
        return WINDOW_TOKENS

    @property
    def preparation(self) -> float:
        return float(self.batches * self.rows * WINDOW_TOKENS)

    def run(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int] = (), *, sure: bool = True
    ) -> UnitResult:
        self.units.update((batch, mask) for mask in masks)
        statuses = tuple(self.failing(mask) for mask in masks)
        cost = self._unit(masks)
        self.charged += cost
        losses = (
            self._losses(batch, mask) if status is Status.OK else ()
            for mask, status in zip(masks, statuses, strict=True)
        )
        return UnitResult(tuple(losses), statuses, cost)

    def plan(self, masks: Sequence[Mask]) -> float:
        return self.batches * self._unit(masks) if masks else 0.0

    def once(self, masks: Sequence[Mask]) -> float:
        return 0.0

    def prepare(self, masks: Sequence[Mask]) -> float:
        return 0.0

    def hints(self) -> tuple[Hints, float]:
        cost = 1.5 * WINDOW_TOKENS
        self.charged += cost
        return replace(self.landscape.hints(), sensitivity=None), cost

    def sensitivity(self) -> tuple[Sensitivity, float]:
        cost = 3.0 * WINDOW_TOKENS
        self.charged += cost
        return self.landscape.sensitivity(), cost

    def _unit(self, masks: Sequence[Mask]) -> float:
        sites = sum(executed_sites(masks))
        sites += self.behind * sum(sum(m.keep[m.dropped[0] :]) for m in masks if m.dropped)
        return self.rows * WINDOW_TOKENS * sites / self.landscape.sites

    def _losses(self, batch: int, mask: Mask) -> tuple[float, ...]:
        mean = float(np.mean(self.landscape.losses(mask)))
        gone = np.array([not kept for kept in mask.keep], dtype=float)
        rng = np.random.default_rng([self.seed, batch])
        shared = rng.normal(0.0, 0.2, self.rows)
        own = rng.normal(0.0, 0.004, (self.rows, self.landscape.sites)) @ gone
        return tuple(float(x) for x in mean + 0.3 + shared + own)


@dataclass
class Search:
    """One search over a toy space with its journal at `path`."""

    path: Path
    plan: Plan
    space: SearchSpace = field(default_factory=toy)
    failing: Failing = never
    behind: float = 0.0
    start: Mapping[str, Any] = field(default_factory=lambda: {"version": "0", "signature": {}})
    on_progress: OnProgress | None = None
    select: Synthetic = field(init=False)
    finals: Synthetic = field(init=False)

    def run(self, on_record: OnRecord | None = None) -> Outcome:
        landscape = Landscape(len(self.space.sites), seed=3)
        self.select = Synthetic(landscape, seed=1, failing=self.failing)
        self.finals = Synthetic(landscape, seed=2, failing=self.failing, behind=self.behind)
        with Journal(self.path) as journal:
            loop = SearchLoop(
                Ledger(journal, on_record),
                self.space,
                self.plan,
                self.select,
                self.finals,
                self.on_progress,
            )
            return loop.run(self.start)
