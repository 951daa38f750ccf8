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
    if config.packable and anatomy.stack.row.parallel and config.granularity != "block":
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

    Raises MaskError for one that the model does not have.
    """
    found: set[int] = set()
    last = max(site.block for site in sites)
    for entry in entries:
        if isinstance(entry, str) and entry not in ("first", "last"):
            found.update(mask_from_names(sites, [entry]).dropped)
            continue
        block = {"first": 0, "last": last}.get(str(entry), entry)
        if not isinstance(block, int) or not 0 <= block <= last:
            raise MaskError(f"the model has no block {entry} to protect: its last is {last}")
        found.update(site.index for site in sites if site.block == block)
    return frozenset(found)
