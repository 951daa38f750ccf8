"""Smaller checkpoints: truncate, write, verify in a clean interpreter."""

from __future__ import annotations

from depthsearch.export.card import CardData, Figure
from depthsearch.export.export import ExportResult, export
from depthsearch.export.native import NativePlan, plan_native, truncated_state
from depthsearch.export.settings import truncated_config
from depthsearch.export.verify import Case, Verification, verify_export, verify_exports

__all__ = [
    "CardData",
    "Case",
    "ExportResult",
    "Figure",
    "NativePlan",
    "Verification",
    "export",
    "plan_native",
    "truncated_config",
    "truncated_state",
    "verify_export",
    "verify_exports",
]
