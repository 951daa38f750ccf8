"""The search space that a configuration describes, of a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from depthsearch.config import SpaceConfig
from depthsearch.errors import MaskError
from depthsearch.model.anatomy import Anatomy
from depthsearch.model.costs import cost_table
from depthsearch.run.latency_table import Latency
from depthsearch.space import Budget, SearchSpace, Site, mask_from_names


def make_space(
    config: SpaceConfig, model: Any, anatomy: Anatomy, latency: Latency | None = None
) -> SearchSpace:
    """The search space of a loaded model; raises BudgetError or MaskError."""
    parallel = any(row.parallel for row in anatomy.rows)
    if config.packable and parallel and config.granularity != "block":
        raise MaskError(
            f"{anatomy.model_class} has parallel blocks, whose sublayers cannot be re-paired: set "
            "'granularity: block' to get masks that export natively"
        )
    context = config.budget.context_tokens
    costs = cost_table(model, anatomy, context)
    return SearchSpace(
        sites=anatomy.sites,
        costs=costs if latency is None else latency.added(costs, anatomy.sites, context),
        budget=Budget.from_json(config.budget.to_budget_json()),
        granularity=config.granularity,
        protected=protected_sites(config.protect, anatomy.sites),
        packable=config.packable,
    )


def protected_sites(entries: Sequence[str | int], sites: Sequence[Site]) -> frozenset[int]:
    """Site indices named by `first`, `last`, a block number, or a site or block name.

    The first, the last and the block of a number are those of every stack that has one. Raises
    MaskError for one that the model does not have.
    """
    found: set[int] = set()
    lasts = {stack: max(s.block for s in sites if s.stack == stack) for stack in _stacks(sites)}
    last = max(lasts.values())
    for entry in entries:
        if isinstance(entry, str) and entry not in ("first", "last"):
            found.update(mask_from_names(sites, [entry]).dropped)
            continue
        if entry == "last":
            found.update(site.index for site in sites if site.block == lasts[site.stack])
            continue
        block = 0 if entry == "first" else entry
        if not isinstance(block, int) or not 0 <= block <= last:
            raise MaskError(f"the model has no block {entry} to protect: its last is {last}")
        found.update(site.index for site in sites if site.block == block)
    return frozenset(found)


def _stacks(sites: Sequence[Site]) -> list[str]:
    return list(dict.fromkeys(site.stack for site in sites))
