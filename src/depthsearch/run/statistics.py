"""Intervals for comparisons: what the choice of seeds and of text leaves open.

Figures come as `[seeds, windows]`: one held-out loss for each search seed and text window. Windows
are the same for all seeds, so seeds and windows are resampled crosswise (the "pigeonhole
bootstrap", Owen 2007): resampling windows anew inside each seed would treat shared text as fresh
text, and print intervals that are too narrow. Budgets are chosen, not drawn, so they are never
resampled.

Drawn from three seeds a mean can't vary as much as from all that there could be, so intervals are
stretched to what Student's t leaves open (see `_half_width`). With one seed an interval shows the
noise of the text alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from depthsearch.errors import DataError
from depthsearch.evaluation.student import critical_value

Losses = npt.ArrayLike
Array = npt.NDArray[np.float64]

_FEWEST_MASKS = 4
"""Below this a rank correlation says nothing, whatever it is."""


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

    def stretched(self, by: float) -> Interval:
        """The same mean with both ends so many times as far from it."""
        low, high = (self.mean + by * (end - self.mean) for end in (self.low, self.high))
        return Interval(self.mean, low, high)

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap_interval(
    values: Losses,
    rng: np.random.Generator,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Mean of `values` `[seeds, windows]` with an interval over seeds and windows.

    Its ends are percentiles of the resampled means, drawn away from the mean by one factor. Raises
    DataError for an empty, non-finite or wrongly shaped array, or a level outside (0, 1).
    """
    table = _table(values)
    _check(level, resamples)
    by_seed, by_window = (_shares(rng, count, resamples) for count in table.shape)
    means = ((by_seed @ table) * by_window).sum(axis=1)
    found = _percentiles(float(table.mean()), means, level)
    if found.low == found.high:
        return found
    return found.stretched(max(1.0, 2 * _half_width(table, level) / (found.high - found.low)))


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


def difference_among(a: Losses, b: Losses, comparisons: int, rng: np.random.Generator) -> Interval:
    """The paired difference with an interval at 95 % for all `comparisons` together.

    Each has its equal share of the error (Bonferroni), as it takes where this one was picked from
    them by its figures. Resamples grow with it: some five lie beyond each end.
    """
    level, resamples = 1 - 0.05 / comparisons, max(2000, 200 * comparisons)
    return paired_difference(a, b, rng, level, resamples)


@dataclass(frozen=True)
class Standing:
    """The mean rank of an arm, 1 for the best, and the share of resamples in which it is first.

    With few seeds the share is no probability: all three seeds of one of two equal arms are better
    once in four times, and it is first in every resample then.
    """

    rank: Interval
    first: float


def standings(
    budgets: Sequence[Losses],
    rng: np.random.Generator,
    level: float = 0.95,
    resamples: int = 2000,
) -> tuple[Standing, ...]:
    """Where each arm stands, from one table `[arms, seeds, windows]` for each budget.

    Arms are ranked by mean loss in each cell of budget and seed, equal ones sharing the mean of
    their places, and ranks are averaged over cells (Friedman 1937). Their intervals are percentiles
    drawn away from the mean by what few seeds hide, to the first and the last place at most; an
    arm with one rank in all cells has an interval without width, however few they are.
    `first` is the share of resamples, of each budget alike, in which the arm has the lowest mean
    over the resampled seeds and windows; arms that share it share the count. A resample takes the
    same seeds and windows at every budget. Raises DataError where the tables don't fit together.
    """
    tables = [np.asarray(budget, dtype=np.float64) for budget in budgets]
    if not tables or tables[0].ndim != 3 or not tables[0].size:
        raise DataError("standings need a table [arms, seeds, windows] for at least one budget")
    if any(table.shape != tables[0].shape for table in tables):
        raise DataError(
            f"tables of shapes {sorted({table.shape for table in tables})} can't be ranked "
            "together: every arm must be measured with the same seeds on the same windows"
        )
    if not all(np.isfinite(table).all() for table in tables):
        raise DataError("losses hold a value that is not finite: leave failed arms out")
    _check(level, resamples)
    arms, seeds, windows = tables[0].shape
    by_seed, by_window = (_shares(rng, count, resamples) for count in (seeds, windows))
    places, firsts = np.zeros((resamples, arms)), np.zeros((resamples, arms))
    means = np.zeros(arms)
    for table in tables:
        cells = np.einsum("asw,rw->ras", table, by_window)
        ranks = midranks(cells.transpose(0, 2, 1))
        places += np.einsum("rsa,rs->ra", ranks, by_seed) / len(tables)
        whole = np.einsum("ras,rs->ra", cells, by_seed)
        first = whole == whole.min(axis=1, keepdims=True)
        firsts += first / first.sum(axis=1, keepdims=True) / len(tables)
        means += midranks(table.mean(axis=2).T).mean(axis=0) / len(tables)
    wider = _stretch(seeds, level)
    found = []
    for arm, share in enumerate(firsts.mean(axis=0).tolist()):
        rank = _percentiles(float(means[arm]), places[:, arm], level).stretched(wider)
        within = Interval(rank.mean, max(1.0, rank.low), min(float(arms), rank.high))
        found.append(Standing(within, share))
    return tuple(found)


def _stretch(seeds: int, level: float) -> float:
    """How much wider Student's t is over so many seeds than percentiles of resampled means."""
    if seeds == 1:
        return 1.0
    tail = (1 - level) / 2
    wider = math.sqrt(seeds / (seeds - 1)) / NormalDist().inv_cdf(1 - tail)
    return critical_value(tail, seeds - 1) * wider


def midranks(values: npt.ArrayLike) -> Array:
    """Ranks along the last axis, 1 for the lowest; equal values share the mean of their places."""
    table = np.asarray(values, dtype=np.float64)
    one, other = table[..., :, None], table[..., None, :]
    ranks: Array = 0.5 + (other < one).sum(axis=-1) + 0.5 * (other == one).sum(axis=-1)
    return ranks


def spearman(first: npt.ArrayLike, second: npt.ArrayLike) -> float | None:
    """The correlation of the mid-ranks of two lists (Spearman 1904); None where one is constant."""
    a, b = (midranks(values) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else None


@dataclass(frozen=True)
class Correlation:
    """A Spearman correlation with its interval, over so many masks."""

    interval: Interval
    masks: int


def rank_correlation(
    groups: Sequence[tuple[npt.ArrayLike, Losses]],
    rng: np.random.Generator,
    level: float = 0.95,
    resamples: int = 1000,
) -> Correlation | None:
    """Spearman of calibration loss and held-out loss, averaged over groups of masks.

    A group holds the masks that were judged on one calibration text: their losses `[masks]` there,
    and `[masks, windows]` on held-out text. Texts differ in difficulty, so losses are ranked inside
    their group only; groups count by their masks. Masks are resampled inside groups, windows across
    all of them. None for fewer than 4 masks in all groups of 3 or more, or without any order.
    """
    known = [(np.asarray(a, dtype=np.float64), _table(b)) for a, b in groups if len(np.shape(b))]
    known = [(a, b) for a, b in known if len(a) >= _FEWEST_MASKS - 1]
    count = sum(len(a) for a, _ in known)
    if count < _FEWEST_MASKS:
        return None
    _check(level, resamples)
    value = _averaged([(len(a), spearman(a, b.mean(axis=1))) for a, b in known])
    if value is None:
        return None
    windows = known[0][1].shape[1]
    by_window = _shares(rng, windows, resamples)
    drawn = []
    for share in by_window:
        parts = []
        for a, b in known:
            rows = rng.integers(len(a), size=len(a))
            parts.append((len(a), spearman(a[rows], (b @ share)[rows])))
        found = _averaged(parts)
        if found is not None:
            drawn.append(found)
    return Correlation(_percentiles(value, np.array(drawn or [value]), level), count)


def _averaged(parts: Sequence[tuple[int, float | None]]) -> float | None:
    """The mean of what is known, weighted."""
    known = [(weight, value) for weight, value in parts if value is not None]
    total = sum(weight for weight, _ in known)
    return sum(weight * value for weight, value in known) / total if known else None


def _shares(rng: np.random.Generator, count: int, resamples: int) -> Array:
    """[resamples, count]: the share of each of `count` things when as many are drawn again."""
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples) / count


def _half_width(table: Array, level: float) -> float:
    """Half the width of the interval of Student's t for the mean of two crossed random effects.

    The standard error is that of seeds and windows without replication, each mean square counted
    at least once, the degrees of freedom are those of Satterthwaite (1946), as many at least as the
    smallest that it is made of (critical values between whole ones by their reciprocals). For two
    equal methods with three seeds and noise between seeds alone, percentiles of resampled means
    exclude zero in a quarter of cases at 95 %; stretched to this width in one of 20.
    """
    seeds, windows = table.shape
    rows, columns = table.mean(axis=1, keepdims=True), table.mean(axis=0, keepdims=True)
    rest = table - rows - columns + table.mean()
    squares: list[tuple[float, int]] = [
        (float((part**2).sum()) * times / size, size)
        for part, times, size in (
            (rows - table.mean(), windows, seeds - 1),
            (columns - table.mean(), seeds, windows - 1),
            (rest, 1, (seeds - 1) * (windows - 1)),
        )
        if size
    ]
    if not any(square for square, _ in squares):
        return 0.0
    by_cell = squares[-1][0] if len(squares) == 3 else 0.0
    largest = max(square for square, _ in squares)
    whole = max(sum(square for square, _ in squares) - 2 * by_cell, largest)
    found = whole**2 / sum(square**2 / size for square, size in squares)
    freedom = max(found, min(size for _, size in squares))
    below, tail = int(freedom), (1 - level) / 2
    # How far from the whole number below, as a share of the way to the next one.
    share = (1 / below - 1 / freedom) * below * (below + 1)
    ends = [critical_value(tail, whole_number) for whole_number in (below, below + 1)]
    critical: float = (1 - share) * ends[0] + share * ends[1]
    return critical * math.sqrt(whole / (seeds * windows))


def _percentiles(value: float, drawn: Array, level: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _check(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise DataError(f"a confidence level lies in (0, 1): got {level}")
    if resamples < 1:
        raise DataError(f"an interval needs at least 1 resample: got {resamples}")


def _table(values: Losses) -> Array:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise DataError(f"expected losses as [seeds, windows]: got an array of shape {table.shape}")
    if not np.isfinite(table).all():
        raise DataError("losses hold a value that is not finite: leave failed arms out")
    return table
