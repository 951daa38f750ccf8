"""A regression of the log-loss over masks: what a search can guess about masks not yet measured.

A Gaussian process (Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, ch. 2
and 5) with two kernels. One is linear in the logarithms of four figures of a mask: how many gaps it
has, what its dropped genes cost alone in sum, and, over its gaps, the sums of root sums of squares
and of largest costs, since a gap costs less than its sites and many gaps more than one. The other
falls off exponentially with the number of genes, and of pairs of neighbours dropped together, in
which two masks differ; it learns the interactions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from depthsearch.space import Evaluation, Mask, SearchSpace, Status

Array = npt.NDArray[np.float64]

_OFFSET = 0.5
"""Added to the figures before the logarithm, in costs of a median gene."""
_CONSTANT = 1.0
_MOST_POINTS = 1000
_BEST_SHARE = 0.75
_SHAPE_POINTS = 192
_TURNS = 3
_CLEARLY = 1e-3
_FEWEST_COMPLETE = 3


@dataclass(frozen=True)
class Observations:
    """Masks `[n]` with their log-losses `[n]` and the variance `[n]` of what is not known of them.

    Where losses are not all positive, they are taken as they are instead of their logarithms.
    """

    masks: tuple[Mask, ...]
    values: Array
    variances: Array

    def __len__(self) -> int:
        return len(self.masks)

    def most_useful(self, count: int = _MOST_POINTS) -> Observations:
        """At most `count` of them: the best, and an even choice of the others."""
        if len(self) <= count:
            return self
        order = sorted(range(len(self)), key=lambda i: (float(self.values[i]), self.masks[i].key))
        best = int(_BEST_SHARE * count)
        return self.of(
            sorted(
                (
                    *order[:best],
                    *(order[best:][i] for i in _spread(len(order) - best, count - best)),
                )
            )
        )

    def of(self, places: Sequence[int]) -> Observations:
        """Those at some places."""
        chosen = list(places)
        masks = tuple(self.masks[i] for i in chosen)
        return Observations(masks, self.values[chosen], self.variances[chosen])


def observe(evaluations: Sequence[Evaluation]) -> Observations:
    """What evaluations tell of the losses on all sequences.

    A mask that lost its race was measured on the first sequences only. How far the loss on these is
    from the loss on all, and how much that varies, is seen on the masks that were measured on all.
    """
    known = [e for e in evaluations if e.loss is not None and np.isfinite(e.loss)]
    complete = [e for e in known if e.status is Status.OK]
    positive = all(min(e.losses) > 0 for e in known)

    def value(losses: Sequence[float]) -> float:
        mean = sum(losses) / len(losses)
        return float(np.log(mean)) if positive else mean

    corrections: dict[int, tuple[float, float]] = {}
    values, variances, masks = [], [], []
    for evaluation in known:
        shift, variance = 0.0, 0.0
        if evaluation.status is Status.ELIMINATED:
            count = len(evaluation.losses)
            if count not in corrections:
                apart = [value(e.losses) - value(e.losses[:count]) for e in complete]
                enough = len(apart) >= _FEWEST_COMPLETE
                corrections[count] = (
                    (float(np.mean(apart)), float(np.var(apart, ddof=1))) if enough else (0.0, 1.0)
                )
            shift, variance = corrections[count]
        masks.append(evaluation.mask)
        values.append(value(evaluation.losses) + shift)
        variances.append(variance)
    return Observations(tuple(masks), np.array(values), np.array(variances))


class MaskFeatures:
    """What the regression sees of a mask; `keys` are what each gene costs alone, one a gene."""

    def __init__(self, space: SearchSpace, keys: Sequence[float]) -> None:
        self._first = [gene[0] for gene in space.genes]
        self._adjoins = np.array(space.adjoins, dtype=float)
        costs = np.maximum(np.array(keys, dtype=float), 0.0)
        scale = float(np.median(costs[costs > 0])) if (costs > 0).any() else 1.0
        self._costs = costs / scale

    def dropped(self, masks: Sequence[Mask]) -> Array:
        """`[n, 2 * genes - 1]` of 0 and 1: genes dropped, and neighbours dropped together."""
        keep = np.array([mask.keep for mask in masks], dtype=bool)[:, self._first]
        gone = (~keep).astype(float)
        return np.concatenate([gone, gone[:, 1:] * gone[:, :-1] * self._adjoins[1:]], axis=1)

    def figures(self, masks: Sequence[Mask]) -> Array:
        """`[n, 4]`: logarithms of the gaps, the sum, the root sums of squares, the largest."""
        gone = self.dropped(masks)[:, : len(self._first)]
        squares, largest, before = (np.zeros(len(masks)) for _ in range(3))
        gaps, roots, peaks = (np.zeros(len(masks)) for _ in range(3))
        for gene, (cost, adjoins) in enumerate(zip(self._costs, self._adjoins, strict=True)):
            now = gone[:, gene]
            ended = before * (1 - now * adjoins)
            gaps += ended
            roots += ended * np.sqrt(squares)
            peaks += ended * largest
            squares = now * (squares * adjoins + cost**2)
            largest = now * np.maximum(largest * adjoins, cost)
            before = now
        gaps += before
        roots += before * np.sqrt(squares)
        peaks += before * largest
        return np.log(_OFFSET + np.stack([gaps, gone @ self._costs, roots, peaks], axis=1))


@dataclass(frozen=True)
class Shape:
    """Hyperparameters: the scales of both kernels and of the noise, and a length.

    Scales are in variances of the observed log-losses, the length in shares of all genes.
    """

    interactions: float = 1.0
    linear: float = 1.0
    noise: float = 1e-3
    length: float = 0.5


_GRID: dict[str, tuple[float, ...]] = {
    "linear": (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0),
    "interactions": (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0, 16.0),
    "noise": (1e-4, 1e-3, 1e-2, 1e-1, 0.5),
    "length": (1 / 8, 1 / 4, 1 / 2, 1.0),
}


class MaskRegression:
    """The Gaussian process fitted to observations; at least two of them.

    The shape is the best of a small grid by the marginal likelihood of at most 192 of the
    observations, one coordinate after the other from a fixed start; the fit uses the 1,000 most
    useful. Nothing is drawn at random.
    """

    def __init__(self, features: MaskFeatures, observations: Observations) -> None:
        self._features = features
        seen = observations.most_useful()
        self._center = float(seen.values.mean())
        self._scale = float(seen.values.std()) or 1.0
        self._targets = (seen.values - self._center) / self._scale
        self._variances = seen.variances / self._scale**2
        figures = features.figures(seen.masks)
        spread = figures.std(axis=0)
        self._middle, self._spread = figures.mean(axis=0), np.where(spread > 1e-9, spread, 1.0)
        self._dropped = features.dropped(seen.masks)
        self._figures = self._standard(figures)
        self.shape = self._best_shape()
        kernel = self._kernel(self.shape, self._dropped, self._figures)
        kernel[np.diag_indices_from(kernel)] += self.shape.noise + self._variances
        self._factor = np.linalg.cholesky(kernel)
        self._weights = np.linalg.solve(kernel, self._targets)

    @property
    def noise(self) -> float:
        """The variance of an observation of a complete mask, in squared log-loss."""
        return self.shape.noise * self._scale**2

    def mean(self, masks: Sequence[Mask]) -> Array:
        """`[n]` expected log-losses."""
        return self._center + self._scale * (self._cross(masks) @ self._weights)

    def covariance(self, masks: Sequence[Mask]) -> Array:
        """`[n, n]`: the covariance of the log-losses without noise."""
        dropped, figures = self._seen(masks)
        known = np.linalg.solve(self._factor, self._cross(masks).T)
        prior = self._kernel(self.shape, dropped, figures)
        return np.asarray(self._scale**2 * (prior - known.T @ known))

    def _cross(self, masks: Sequence[Mask]) -> Array:
        dropped, figures = self._seen(masks)
        return self._kernel(self.shape, dropped, figures, self._dropped, self._figures)

    def _seen(self, masks: Sequence[Mask]) -> tuple[Array, Array]:
        return self._features.dropped(masks), self._standard(self._features.figures(masks))

    def _standard(self, figures: Array) -> Array:
        return np.asarray((figures - self._middle) / self._spread)

    def _kernel(
        self,
        shape: Shape,
        dropped: Array,
        figures: Array,
        other_dropped: Array | None = None,
        other_figures: Array | None = None,
    ) -> Array:
        apart = _differences(dropped, dropped if other_dropped is None else other_dropped)
        along = figures @ (figures if other_figures is None else other_figures).T
        return self._mixed(shape, apart, along)

    def _mixed(self, shape: Shape, apart: Array, along: Array) -> Array:
        genes = (self._dropped.shape[1] + 1) // 2
        near = np.exp(apart / (-shape.length * genes))
        return np.asarray(_CONSTANT + shape.linear * along + shape.interactions * near)

    def _best_shape(self) -> Shape:
        places = _spread(len(self._targets), _SHAPE_POINTS)
        dropped, figures = self._dropped[places], self._figures[places]
        apart, along = _differences(dropped, dropped), figures @ figures.T
        targets, variances = self._targets[places], self._variances[places]
        known: dict[Shape, float] = {}

        def cost(shape: Shape) -> float:
            if shape not in known:
                kernel = self._mixed(shape, apart, along)
                kernel[np.diag_indices_from(kernel)] += shape.noise + variances
                known[shape] = negative_log_likelihood(kernel, targets)
            return known[shape]

        best = Shape()
        for _ in range(_TURNS):
            before = best
            for name, values in _GRID.items():
                for value in values:
                    changes: dict[str, Any] = {name: value}
                    other = replace(best, **changes)
                    # A clear difference, so that the last digits never decide.
                    if cost(other) < cost(best) - _CLEARLY:
                        best = other
            if best == before:
                break
        return best


def negative_log_likelihood(kernel: Array, targets: Array) -> float:
    """Minus the log marginal likelihood of targets `[n]` (eq. 2.30), the constant left out."""
    factor = np.linalg.cholesky(kernel)
    white = np.linalg.solve(factor, targets)
    return float(0.5 * white @ white + np.log(np.diag(factor)).sum())


def _differences(a: Array, b: Array) -> Array:
    """`[n, m]`: in how many columns rows of zeros and ones differ."""
    return np.asarray(a.sum(axis=1)[:, None] + b.sum(axis=1)[None, :] - 2 * a @ b.T, dtype=float)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly."""
    if count <= most:
        return list(range(count))
    return [place * count // most for place in range(most)]
