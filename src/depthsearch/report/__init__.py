"""The HTML report: one page for a run, one for a comparison, one for a calibration check."""

from __future__ import annotations

from depthsearch.report.html import (
    calibration_report,
    compare_html,
    compare_report,
    run_report,
    write_report,
)

__all__ = ["calibration_report", "compare_html", "compare_report", "run_report", "write_report"]
