"""Figures of a finished model: perplexity, size, speed, latency and memory."""

from __future__ import annotations

from depthsearch.quality.latency import StepTimes, Times, measure_parts, measure_steps
from depthsearch.quality.perplexity import Perplexity, perplexity
from depthsearch.quality.size import Size, measure_size
from depthsearch.quality.speed import PeakMemory, Speed, Timing, measure_speed, peak_memory
from depthsearch.quality.written import ChrF, score_written

__all__ = [
    "ChrF",
    "PeakMemory",
    "Perplexity",
    "Size",
    "Speed",
    "StepTimes",
    "Times",
    "Timing",
    "measure_parts",
    "measure_size",
    "measure_speed",
    "measure_steps",
    "peak_memory",
    "perplexity",
    "score_written",
]
