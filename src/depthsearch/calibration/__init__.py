"""Calibration data: text to token windows, split by document so that nothing leaks."""

from __future__ import annotations

from depthsearch.calibration.text import Documents, load_documents
from depthsearch.calibration.windows import Splits, batches, make_splits

__all__ = ["Documents", "Splits", "batches", "load_documents", "make_splits"]
