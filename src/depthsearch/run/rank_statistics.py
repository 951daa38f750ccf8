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

from depthsearch.run.statistics import Interval

Table = npt.NDArray[np.float64]

SETTLED = 0.9
"""The share of draws that one mask must win for the winner to count as settled."""


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


@dataclass(frozen=True)
class SizeFigures:
    """What choosing the winner on texts of one size comes to.

    `shares` `[masks]` says how often each mask wins; `excess` `[masks, windows]` is the held-out
    loss of each above that of the mask with the lowest held-out mean.
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
        """The expected held-out loss of the winner above that of the best mask."""
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
        windows, shares, heldout - heldout[winner(truth)], float(np.mean(taus)) if taus else None
    )


def smallest_sufficient(sizes: Sequence[SizeFigures]) -> int:
    """The place of the smallest size that loses next to nothing, by a one-standard-error rule.

    The regrets of it and of every larger size are within one standard error of the lowest one (as
    Breiman et al. 1984, "Classification and Regression Trees", choose the size of a tree). `sizes`
    ascend.
    """
    lowest = min(size.regret for size in sizes)
    place = len(sizes) - 1
    while place > 0:
        size = sizes[place - 1]
        if size.regret - lowest > size.regret_stderr:
            break
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
