"""The budget: one true cost, or two, that the smaller model must not exceed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from depthsearch.errors import BudgetError
from depthsearch.space.cost import METRICS, CostTable, SiteCosts, cost_text
from depthsearch.space.site import Site

BudgetMetric = Literal["params", "bytes", "flops", "kv_bytes", "latency", "sites", "blocks"]
Scope = Literal["model", "blocks"]


@dataclass(frozen=True)
class Budget:
    """Exactly one of `ratio` (of the dense figure), `cap` (absolute) or `drop` (a count).

    `metric` is params, bytes, flops, kv_bytes or latency with a ratio or a cap; sites or blocks
    with a drop count. `of` says what a ratio refers to: the whole model's figure, or the figure of
    all its blocks (embeddings, final norm and head left out, the field's usual "sparsity"). `also`
    is a budget of another metric that must be met besides.
    """

    metric: BudgetMetric
    ratio: float | None = None
    cap: int | None = None
    drop: int | None = None
    of: Scope = "model"
    also: Budget | None = None

    def __post_init__(self) -> None:
        if self.metric not in get_args(BudgetMetric):
            raise BudgetError(
                f"unknown budget metric '{self.metric}': expected one of "
                f"{', '.join(get_args(BudgetMetric))}"
            )
        if self.of not in get_args(Scope):
            raise BudgetError(f"a budget is 'of: model' or 'of: blocks', not '{self.of}'")
        given = [v for v in (self.ratio, self.cap, self.drop) if v is not None]
        counted = self.metric in ("sites", "blocks")
        if len(given) != 1 or counted != (self.drop is not None):
            raise BudgetError(
                f"a {self.metric} budget takes "
                + ("a drop count" if counted else "exactly one of a ratio or an absolute cap")
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise BudgetError(f"a budget ratio lies in (0, 1]: got {self.ratio}")
        if self.cap is not None and self.cap <= 0:
            raise BudgetError(f"a budget cap is positive: got {self.cap}")
        if self.drop is not None and self.drop < 1:
            raise BudgetError(f"a drop count is at least 1: got {self.drop}")
        if self.also is not None and (self.also.also or self.also.metric == self.metric):
            raise BudgetError("two budgets that hold together are of two metrics, one each")

    @property
    def parts(self) -> tuple[Budget, ...]:
        """The budgets of one cost that this one consists of, one or two."""
        return (self,) if self.also is None else (replace(self, also=None), self.also)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of the parts."""
        return tuple(part.metric for part in self.parts)

    def costs(self, table: CostTable, sites: tuple[Site, ...]) -> SiteCosts:
        """The costs its own cap is counted in; for counts, one for each site or block."""
        if self.metric in METRICS:
            return table.of(self.metric)
        if self.metric == "sites":
            return SiteCosts(0, (1,) * len(sites))
        members: dict[tuple[str, int], list[int]] = {}
        for site in sites:
            members.setdefault((site.stack, site.block), []).append(site.index)
        return SiteCosts(
            0, (0,) * len(sites), tuple((tuple(group), 1) for group in members.values())
        )

    def cap_for(self, costs: SiteCosts) -> int:
        """The largest cost allowed, in the metric's own unit."""
        if self.cap is not None:
            return self.cap
        if self.drop is not None:
            return costs.blocks - self.drop
        assert self.ratio is not None
        if self.of == "blocks":
            return costs.fixed + _share(self.ratio, costs.blocks)
        return _share(self.ratio, costs.fixed + costs.blocks)

    @property
    def text(self) -> str:
        """A short phrase for people, such as "params at most 75 % of the blocks"."""
        return " and ".join(part._own_text for part in self.parts)

    @property
    def _own_text(self) -> str:
        if self.drop is not None:
            return f"{self.drop} {self.metric} dropped"
        if self.cap is not None:
            return f"{self.metric} at most {cost_text(self.metric, self.cap)}"
        assert self.ratio is not None
        whole = "the dense model" if self.of == "model" else "the dense model's blocks"
        return f"{self.metric} at most {100 * self.ratio:g} % of {whole}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "metric": self.metric,
            "ratio": self.ratio,
            "cap": self.cap,
            "drop": self.drop,
            "of": self.of,
            **({} if self.also is None else {"also": self.also.to_json()}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Budget:
        """Rebuild from `to_json`."""
        also = data.get("also")
        return cls(
            data["metric"],
            data["ratio"],
            data["cap"],
            data["drop"],
            data["of"],
            None if also is None else cls.from_json(also),
        )


def _share(ratio: float, total: int) -> int:
    """`ratio * total` rounded down, except that a binary rounding error never costs a whole unit.

    0.57 * 100 is 56.99999999999999 in floating point, but 57 is what was asked for.
    """
    exact = ratio * total
    nearest = round(exact)
    return nearest if math.isclose(exact, nearest, rel_tol=1e-15) else math.floor(exact)
