"""How far samples of text agree on masks: ranks, winners, and what trusting one sample costs.

Losses come as tables `[masks, windows]`, one for each text, with the same masks in the same order.
Lower is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from depthsearch.evaluation.student import critical_value
from depthsearch.run.statistics import Interval

Table = npt.NDArray[np.float64]

SETTLED = 0.9
"""The share of draws that one mask must win for the winner to count as settled."""

NEGLIGIBLE = 0.1
"""A size of text is enough where it loses at most this share of what the median mask loses."""


def correlations(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[float, float] | None:
    """Kendall's tau-b and Spearman's rho of two vectors; None where one of them is constant.

    Both compare the signs of all differences: tau-b correlates the signs themselves, rho their sums
    by item, which are the ranks with ties shared (Kendall 1948, "Rank Correlation Methods",
    general correlation coefficient).
    """
    signs = [np.sign(np.subtract.outer(x, x)) for x in (np.asarray(a, float), np.asarray(b, float))]
    norms = [float((s * s).sum()) for s in signs]
    if not all(norms):
        return None
    tau = float((signs[0] * signs[1]).sum()) / float(np.sqrt(norms[0] * norms[1]))
    first, second = (s.sum(axis=1) for s in signs)
    rho = float(first @ second) / float(np.sqrt((first @ first) * (second @ second)))
    return tau, rho


@dataclass(frozen=True)
class Agreement:
    """How alike two texts rank masks, with bootstrap intervals over the windows of both."""

    kendall: Interval
    spearman: Interval


def agreement(
    a: Table,
    b: Table,
    rng: np.random.Generator,
    level: float = 0.95,
    resamples: int = 1000,
) -> Agreement | None:
    """The rank correlations of mean losses on two texts; None where all masks tie on one of them.

    The windows of each text are resampled on their own. A resample is noisier than the text, so the
    percentile interval leans to the low side of the figure itself.
    """
    here = correlations(a.mean(axis=1), b.mean(axis=1))
    if here is None:
        return None
    drawn = [
        found
        for x, y in zip(resampled(a, rng, resamples), resampled(b, rng, resamples), strict=True)
        if (found := correlations(x, y)) is not None
    ]
    ends = np.quantile(np.array(drawn or [here]), [(1 - level) / 2, (1 + level) / 2], axis=0)
    tau, rho = (
        Interval(value, float(low), float(high))
        for value, low, high in zip(here, *ends, strict=True)
    )
    return Agreement(tau, rho)


def resampled(
    table: Table, rng: np.random.Generator, resamples: int, windows: int | None = None
) -> Table:
    """Mean losses `[resamples, masks]` on texts of `windows` windows drawn with replacement."""
    there = table.shape[1]
    count = there if windows is None else windows
    drawn = rng.multinomial(count, np.full(there, 1 / there), size=resamples) / count
    return np.asarray(drawn @ table.T)


def winner(losses: npt.ArrayLike) -> int:
    """The place of the lowest loss, the first of equal ones."""
    return int(np.argmin(np.asarray(losses)))


def rival(losses: Table) -> Table:
    """The losses `[windows]` of the best mask, told on the other half of the windows each time.

    On the windows that it was chosen on, the best of several equal masks is ahead by luck.
    """
    halves = np.array_split(np.arange(losses.shape[1]), 2)
    if not len(halves[1]):
        halves = halves[:1] * 2
    found = np.empty(losses.shape[1])
    for there, here in (halves, halves[::-1]):
        found[here] = losses[winner(losses[:, there].mean(axis=1)), here]
    return found


@dataclass(frozen=True)
class SizeFigures:
    """What choosing the winner on texts of one size comes to.

    `shares` `[masks]` says how often each mask wins; `excess` `[masks, windows]` is the held-out
    loss of each above that of their `rival`.
    """

    windows: int
    shares: Table
    excess: Table
    kendall: float | None

    @cached_property
    def favourite(self) -> int:
        """The mask that wins most often."""
        return int(np.argmax(self.shares))

    @cached_property
    def regret(self) -> float:
        """The expected held-out loss of the winner above that of the rival."""
        return float(self.shares @ self.excess.mean(axis=1))

    @cached_property
    def regret_stderr(self) -> float:
        """The standard error of `regret`, had each held-out window the winner of its own text.

        Both the winner and the window are random: with the shares alone as weights, the error would
        shrink with the share of a worse mask as fast as the regret does.
        """
        windows = self.excess.shape[1]
        spread = float(self.shares @ ((self.excess - self.regret) ** 2).sum(axis=1))
        return float(np.sqrt(spread / (windows - 1) / windows))


def size_figures(
    pool: Table, heldout: Table, windows: int, rng: np.random.Generator, resamples: int = 1000
) -> SizeFigures:
    """Choose the winner on many texts of so many windows, drawn from `pool` with replacement.

    With replacement, texts as large as the pool still differ, as other texts of that size would.
    """
    means = resampled(pool, rng, resamples, windows)
    shares = np.bincount(means.argmin(axis=1), minlength=len(pool)) / resamples
    truth = heldout.mean(axis=1)
    taus = [found[0] for row in means if (found := correlations(row, truth)) is not None]
    return SizeFigures(
        windows, shares, heldout - rival(heldout), float(np.mean(taus)) if taus else None
    )


def above_lowest(sizes: Sequence[SizeFigures], level: float = 0.95) -> tuple[Interval, ...]:
    """How far the regret of each size is above the lowest one, by Student's t.

    Sizes are paired by held-out window: what a window does to all masks alike is no error of a
    difference.
    """
    best = min(sizes, key=lambda size: size.regret)
    return tuple(_paired(size.shares - best.shares, best.excess, level) for size in sizes)


def _paired(weights: Table, excess: Table, level: float) -> Interval:
    """The mean over windows of `weights` `[masks]` times `excess` `[masks, windows]`."""
    by_window = weights @ excess
    mean, windows = float(by_window.mean()), len(by_window)
    if not weights.any():
        return Interval(0.0, 0.0, 0.0)
    spread = float(by_window.std(ddof=1)) / float(np.sqrt(windows))
    half = critical_value((1 - level) / 2, windows - 1) * spread
    return Interval(mean, mean - half, mean + half)


def smallest_sufficient(sizes: Sequence[SizeFigures]) -> int:
    """The place of the smallest size from which on all are shown to lose next to nothing.

    What is negligible goes by the masks, not by the error: little held-out text must not make any
    size do. The largest size counts as enough. `sizes` ascend.
    """
    limit = _negligible(sizes)
    return _from_on([above.high <= limit for above in above_lowest(sizes)])


def smallest_possible(sizes: Sequence[SizeFigures]) -> int:
    """The place of the smallest size from which on none is shown to lose more than nothing.

    At most that of `smallest_sufficient`: in between held-out text can't tell.
    """
    limit = _negligible(sizes)
    return _from_on([above.low <= 0 or above.high <= limit for above in above_lowest(sizes)])


def _negligible(sizes: Sequence[SizeFigures]) -> float:
    """The loss that more text need not save, from how far the masks lie apart."""
    return max(0.0, NEGLIGIBLE * float(np.median(sizes[-1].excess.mean(axis=1))))


def _from_on(holds: Sequence[bool]) -> int:
    """The first place from which on all hold, the last one of them taken to."""
    place = len(holds) - 1
    while place and holds[place - 1]:
        place -= 1
    return place


def settled(sizes: Sequence[SizeFigures], level: float = SETTLED) -> int | None:
    """The place of the size from which on one mask wins nearly always; None where it never does.

    At that size and every larger one the same mask wins at least `level` of the draws.
    """
    place = None
    for here in range(len(sizes) - 1, -1, -1):
        size = sizes[here]
        if size.favourite != sizes[-1].favourite or size.shares[size.favourite] < level:
            break
        place = here
    return place
