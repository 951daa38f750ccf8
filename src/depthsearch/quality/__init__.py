"""Figures of a finished model: perplexity, size, speed and memory."""

from __future__ import annotations

from depthsearch.quality.perplexity import Perplexity, perplexity
from depthsearch.quality.size import Size, measure_size
from depthsearch.quality.speed import PeakMemory, Speed, Timing, measure_speed, peak_memory

__all__ = [
    "PeakMemory",
    "Perplexity",
    "Size",
    "Speed",
    "Timing",
    "measure_size",
    "measure_speed",
    "peak_memory",
    "perplexity",
]
