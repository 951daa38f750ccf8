"""Evaluation of many masks: prefix sharing, racing, and the backends that compute units."""

from __future__ import annotations

from depthsearch.evaluation.backend import Backend, UnitResult
from depthsearch.evaluation.inprocess import InProcess
from depthsearch.evaluation.prefix import executed_sites
from depthsearch.evaluation.racing import Racing, evaluate
from depthsearch.evaluation.refitted import Refitted
from depthsearch.evaluation.rescaled import Rescaled
from depthsearch.evaluation.streamed import Streamed
from depthsearch.evaluation.written import Written

__all__ = [
    "Backend",
    "InProcess",
    "Racing",
    "Refitted",
    "Rescaled",
    "Streamed",
    "UnitResult",
    "Written",
    "evaluate",
    "executed_sites",
]
