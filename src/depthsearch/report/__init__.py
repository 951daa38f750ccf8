"""The HTML report: one page for a run, one for a comparison of arms."""

from __future__ import annotations

from depthsearch.report.html import compare_html, compare_report, run_report, write_report

__all__ = ["compare_html", "compare_report", "run_report", "write_report"]
