"""The run file: one YAML a run, validated into frozen objects."""

from __future__ import annotations

from depthsearch.config.budgets import BudgetConfig, FrontConfig, SpaceConfig
from depthsearch.config.loading import config_from_mapping, load_config, resolved_yaml, to_yaml
from depthsearch.config.schema import (
    CalibrationConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrackingConfig,
)
from depthsearch.config.searches import CompareConfig, SearchConfig

__all__ = [
    "BudgetConfig",
    "CalibrationConfig",
    "CompareConfig",
    "FrontConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "RunConfig",
    "SearchConfig",
    "SpaceConfig",
    "TrackingConfig",
    "config_from_mapping",
    "load_config",
    "resolved_yaml",
    "to_yaml",
]
