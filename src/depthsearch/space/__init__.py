"""Sites, masks, costs, budgets and the search space; no torch in here."""

from __future__ import annotations

from depthsearch.space.budget import Budget
from depthsearch.space.cost import METRICS, CostTable, SiteCosts, cost_text
from depthsearch.space.evaluation import (
    Batch,
    Evaluation,
    Hints,
    Proposal,
    Sensitivity,
    Stage,
    Status,
)
from depthsearch.space.front import (
    Grid,
    budget_grid,
    front_limits,
    front_metrics,
    front_of,
    hypervolume,
    nondominated,
)
from depthsearch.space.limit import Limit
from depthsearch.space.mask import Mask, mask_from_names
from depthsearch.space.packing import is_packable
from depthsearch.space.site import KINDS, Kind, Site, parse_site_name
from depthsearch.space.space import Granularity, SearchSpace

__all__ = [
    "KINDS",
    "METRICS",
    "Batch",
    "Budget",
    "CostTable",
    "Evaluation",
    "Granularity",
    "Grid",
    "Hints",
    "Kind",
    "Limit",
    "Mask",
    "Proposal",
    "SearchSpace",
    "Sensitivity",
    "Site",
    "SiteCosts",
    "Stage",
    "Status",
    "budget_grid",
    "cost_text",
    "front_limits",
    "front_metrics",
    "front_of",
    "hypervolume",
    "is_packable",
    "mask_from_names",
    "nondominated",
    "parse_site_name",
]
