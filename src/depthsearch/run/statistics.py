"""Intervals for comparisons: what the choice of seeds and of text leaves open.

Figures come as `[seeds, windows]`: one held-out loss for each search seed and text window. Windows
are the same for all seeds, so seeds and windows are resampled crosswise (the "pigeonhole
bootstrap", Owen 2007): resampling windows anew inside each seed would treat shared text as fresh
text, and print intervals that are too narrow. With few seeds the interval mostly shows the noise of
the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from depthsearch.errors import DataError

Losses = npt.ArrayLike


@dataclass(frozen=True)
class Interval:
    """A mean and the two ends of its bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def side(self) -> int:
        """-1 where the whole interval is below zero, 1 where it is above, 0 where it holds zero."""
        return int(self.low > 0) - int(self.high < 0)

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap_interval(
    values: Losses,
    rng: np.random.Generator,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Mean of `values` `[seeds, windows]` with a percentile interval over seeds and windows.

    Raises DataError for an empty, non-finite or wrongly shaped array, or a level outside (0, 1).
    """
    table = _table(values)
    if not 0 < level < 1:
        raise DataError(f"a confidence level lies in (0, 1): got {level}")
    if resamples < 1:
        raise DataError(f"an interval needs at least 1 resample: got {resamples}")
    seeds, windows = table.shape
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    by_window = rng.multinomial(windows, np.full(windows, 1 / windows), size=resamples) / windows
    means = ((by_seed @ table) * by_window).sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(table.mean()), float(low), float(high))


def paired_difference(
    a: Losses,
    b: Losses,
    rng: np.random.Generator,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Mean of `a - b`, both `[seeds, windows]`, paired by seed and by window.

    An arm that has one row, because its method has no randomness, is paired with every seed of the
    other. Below zero means that `a` is better. Raises DataError where the two can't be paired.
    """
    first, second = _table(a), _table(b)
    if first.shape[1] != second.shape[1]:
        raise DataError(
            f"losses of {first.shape[1]} and {second.shape[1]} windows can't be paired: both arms "
            "must be measured on the same windows"
        )
    if first.shape[0] != second.shape[0] and 1 not in (first.shape[0], second.shape[0]):
        raise DataError(
            f"arms with {first.shape[0]} and {second.shape[0]} seeds can't be paired: give both "
            "the same seeds"
        )
    return bootstrap_interval(first - second, rng, level, resamples)


def _table(values: Losses) -> npt.NDArray[np.float64]:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise DataError(f"expected losses as [seeds, windows]: got an array of shape {table.shape}")
    if not np.isfinite(table).all():
        raise DataError("losses hold a value that is not finite: leave failed arms out")
    return table
