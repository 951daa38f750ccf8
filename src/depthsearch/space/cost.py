"""What each site costs, in whole units, for each budget metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from depthsearch.errors import BudgetError
from depthsearch.space.mask import Mask

METRICS = ("params", "bytes", "flops", "kv_bytes", "latency")
"""What a budget may limit besides counts; latency only where it has been measured."""


def cost_text(metric: str, cost: int) -> str:
    """A cost for people, with its unit where the metric's name doesn't tell it: "12.5 ms"."""
    if metric != "latency":
        return f"{cost:,}"
    ms = cost / 1e6
    return f"{ms:.4g} ms" if ms < 1000 else f"{ms:,.0f} ms"


@dataclass(frozen=True)
class SiteCosts:
    """One metric: a fixed part, a part for each site, and parts shared between sites.

    `sites[i]` is paid while site i is kept. A shared part `(indices, amount)` is paid while any of
    its sites is kept (the one norm of a parallel block goes only when both sublayers go).
    """

    fixed: int
    sites: tuple[int, ...]
    shared: tuple[tuple[tuple[int, ...], int], ...] = ()

    def of(self, mask: Mask) -> int:
        """The cost of the masked model."""
        total = self.fixed + sum(
            cost for cost, kept in zip(self.sites, mask.keep, strict=True) if kept
        )
        for indices, amount in self.shared:
            if any(mask.keep[i] for i in indices):
                total += amount
        return total

    @property
    def blocks(self) -> int:
        """The cost of all sites together, without the fixed part."""
        return sum(self.sites) + sum(amount for _, amount in self.shared)

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "fixed": self.fixed,
            "sites": list(self.sites),
            "shared": [[list(indices), amount] for indices, amount in self.shared],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SiteCosts:
        """Rebuild from `to_json`."""
        return cls(
            int(data["fixed"]),
            tuple(int(c) for c in data["sites"]),
            tuple((tuple(int(i) for i in s), int(a)) for s, a in data["shared"]),
        )


@dataclass(frozen=True)
class CostTable:
    """`SiteCosts` for every metric: params, bytes, flops (a token), kv_bytes (a token).

    Where it has been measured also latency: nanoseconds of one decoding step.
    """

    metrics: Mapping[str, SiteCosts]

    def of(self, metric: str) -> SiteCosts:
        """The costs under one metric; raises BudgetError for an unknown one."""
        if metric not in self.metrics:
            raise BudgetError(
                f"no costs are known for '{metric}': expected one of {', '.join(self.metrics)}"
            )
        return self.metrics[metric]

    def cost(self, metric: str, mask: Mask) -> int:
        """What the masked model costs under `metric`."""
        return self.of(metric).of(mask)

    def total(self, metric: str) -> int:
        """What the dense model costs under `metric`."""
        costs = self.of(metric)
        return costs.fixed + costs.blocks

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: costs.to_json() for name, costs in self.metrics.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CostTable:
        """Rebuild from `to_json`."""
        return cls({str(name): SiteCosts.from_json(costs) for name, costs in data.items()})
