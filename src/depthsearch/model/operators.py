"""Closed-form repair: weights refitted so that a cut model follows the dense one.

Where sublayers behind a projection are gone, its weight is refitted by ridge least squares, so that
the stream comes as close as it can to the dense model's behind the gap. Nearest in print: ReplaceMe
(arXiv 2505.02819), which folds one map into one projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from depthsearch.model.repair import Patch, Projection

RIDGES = (0.03, 0.1, 0.3, 1.0)
"""Strengths tried on held-back tokens, relative to the mean of the Gram matrix' diagonal.

Up to 10 the held-back tokens often choose more than 1, projection by projection, and the model is
worse in the end: held-out KL 0.569 in place of 0.551, and 0.558 with 0.3 as the largest
(SmolLM2-135M, 75 % of the block parameters, sequential repair on 32,768 tokens, one mask and seed).
"""

RANK = 64
"""How many directions of the stream a repair of low rank may change."""


class Normal:
    """Normal equations of one projection for several targets, summed over tokens in float64.

    `gram` is `[in, in]`, `cross[target]` `[in, out]` of the inputs and what the stream lacks, and
    `energy[target]` the summed square of what it lacks. A bias is one more input that is always 1.
    The inputs are the projection's `regressors`.
    """

    def __init__(self, projection: Projection, targets: Sequence[int]) -> None:
        self._projection = projection
        wide, out = projection.shape
        like = torch.zeros((), dtype=torch.float64, device=projection.weight.device)
        self.gram = like.new_zeros(wide, wide)
        self.cross = {target: like.new_zeros(wide, out) for target in targets}
        self.energy = dict.fromkeys(targets, 0.0)

    def add(self, inputs: Tensor, lacking: dict[int, Tensor], weights: Tensor) -> None:
        """Add tokens: inputs `[token, in]`, `lacking[target]` `[token, out]`, weights `[token]`."""
        root = weights.sqrt().unsqueeze(-1)
        z = self._projection.regressors(inputs) * root
        self.gram += (z.T @ z).double()
        for target, lack in lacking.items():
            error = lack.float() * root
            self.cross[target] += (z.T @ error).double()
            self.energy[target] += float(error.double().square().sum())

    def join(self, other: Normal) -> None:
        """Add the tokens of `other`, which has the same targets."""
        self.gram += other.gram
        for target, cross in other.cross.items():
            self.cross[target] += cross
            self.energy[target] += other.energy[target]

    def left(self, target: int, change: Tensor) -> float:
        """The share of the error that is left with `change` `[in, out]` added to the weight."""
        gained = 2 * (change * self.cross[target]).sum() - (change * (self.gram @ change)).sum()
        return 1.0 - float(gained) / max(self.energy[target], 1e-300)


Solve = Callable[[Tensor], Tensor]
"""The change of a weight for one target, from that target's `Normal.cross`; both in float64."""


@dataclass(frozen=True)
class Operator:
    """A way to change a projection, given the normal equations of what the stream lacks.

    `prepare(gram, weight, ridge)` does once what all targets share, for `gram` `[in, in]` and a
    weight `[in, out]`; it is None where that is ill-conditioned. `flops(in, out)` are those of
    `prepare`, and those of solving for one target.
    """

    prepare: Callable[[Tensor, Tensor, float], Solve | None]
    flops: Callable[[int, int], tuple[int, int]]


def refit(gram: Tensor, weight: Tensor, ridge: float) -> Solve | None:
    """Ridge least squares for the whole matrix, pulled towards the old weight."""
    return _ridge_solve(gram, ridge)


def folded_map(gram: Tensor, weight: Tensor, ridge: float) -> Solve | None:
    """One `[out, out]` map behind the projection, folded into it (ReplaceMe, section 2)."""
    solve = _ridge_solve(weight.T @ gram @ weight, ridge)
    return None if solve is None else lambda cross: weight @ solve(weight.T @ cross)


def per_channel(gram: Tensor, weight: Tensor, ridge: float) -> Solve | None:
    """One factor for each output channel, for very little text."""
    solve = _channel_solve((weight * (gram @ weight)).sum(0), ridge)
    return None if solve is None else lambda cross: weight * solve((weight * cross).sum(0))


def low_rank(rank: int = RANK) -> Operator:
    """The change of the whole matrix that is best among those of at most `rank`, for little text.

    Reduced-rank ridge regression (Mukherjee and Zhu 2011, doi 10.1002/sam.10138): the ridge
    solution B, projected on the leading right-singular directions of the values it fits. With the
    penalty's rows counted as values to fit, as there, these are the eigenvectors of `B^T cross`.
    """

    def prepare(gram: Tensor, weight: Tensor, ridge: float) -> Solve | None:
        solve = _ridge_solve(gram, ridge)
        if solve is None or rank >= min(weight.shape):
            return solve

        def restricted(cross: Tensor) -> Tensor:
            change = solve(cross)
            fitted = change.T @ cross
            if not bool(fitted.isfinite().all()):
                return change  # It has no eigenvectors, and no error that is lower.
            _, directions = torch.linalg.eigh((fitted + fitted.T) / 2)
            leading = directions[:, -rank:]
            projected: Tensor = (change @ leading) @ leading.T
            return projected

        return restricted

    def flops(wide: int, out: int) -> tuple[int, int]:
        factor, solve = _refit_flops(wide, out)
        if rank >= min(wide, out):
            return factor, solve
        # A symmetric eigendecomposition takes about 9 n^3 (Golub and Van Loan, section 8.3).
        return factor, solve + 2 * wide * out * out + 9 * out**3 + 4 * wide * out * rank

    return Operator(prepare, flops)


def _refit_flops(wide: int, out: int) -> tuple[int, int]:
    return wide**3 // 3, 2 * wide * wide * out


def _map_flops(wide: int, out: int) -> tuple[int, int]:
    products = 2 * wide * wide * out + 2 * wide * out * out
    return products + out**3 // 3, 4 * wide * out * out + 2 * out**3


def _channel_flops(wide: int, out: int) -> tuple[int, int]:
    return 2 * wide * wide * out + 2 * wide * out, 3 * wide * out


OPERATORS: dict[str, Operator] = {
    "refit": Operator(refit, _refit_flops),
    "low_rank": low_rank(),
    "map": Operator(folded_map, _map_flops),
    "channel": Operator(per_channel, _channel_flops),
}
"""The ways to change a projection, by name."""


@dataclass(frozen=True)
class Fits:
    """The projection refitted for each target, None where the weight is better left alone.

    That is so where no ridge lowers the error of the held-back tokens; for the targets in
    `ill_conditioned` no system could be solved: the inputs were all zero, or not finite.
    """

    patches: dict[int, Patch | None]
    ill_conditioned: frozenset[int]


def solved(projection: Projection, fit: Normal, held: Normal, operator: Operator) -> Fits:
    """The projection refitted for every target of `fit`, each ridge chosen on the tokens held back.

    The chosen ridge is then used on all tokens: `fit` has those of `held` too afterwards. What
    targets share is computed once a ridge, and a target's patch is the same in any company.
    """
    old = projection.stacked * projection.gains
    best: dict[int, tuple[float, float]] = {}
    solvable = False
    for ridge in RIDGES:
        solve = operator.prepare(fit.gram, old, ridge)
        if solve is None:
            continue
        solvable = True
        for target, cross in fit.cross.items():
            left = held.left(target, projection.reached(solve(cross)))
            if left < (best[target][0] if target in best else 1.0):
                best[target] = (left, ridge)
    fit.join(held)
    patches: dict[int, Patch | None] = dict.fromkeys(fit.cross)
    for ridge in sorted({ridge for _, ridge in best.values()}):
        solve = operator.prepare(fit.gram, old, ridge)
        for target, (left, own) in best.items():
            if own == ridge and solve is not None:
                change = projection.reached(solve(fit.cross[target]))
                patches[target] = projection.patch(change, fit.gram, ridge, left)
    unsolved = best.keys() - {t for t, patch in patches.items() if patch is not None}
    return Fits(patches, frozenset(unsolved if solvable else patches))


def token_weights(dense: Tensor) -> Tensor:
    """Weights `[token]` that make errors relative: one over the mean square of `[token, hidden]`.

    The norms of what follows are blind to the size of a token's stream, so a first token with
    massive activations must count no more than any other.
    """
    return 1.0 / dense.float().square().mean(-1).clamp_min(1e-12)


def _ridge_solve(gram: Tensor, ridge: float) -> Solve | None:
    strengthened = gram.clone()
    strengthened.diagonal().add_(ridge * gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(strengthened)
    return None if int(failed) else lambda cross: torch.cholesky_solve(cross, factor)


def _channel_solve(squares: Tensor, ridge: float) -> Solve | None:
    below = squares + ridge * squares.mean()
    if not bool((below > 0).all() and below.isfinite().all()):
        return None
    return lambda cross: cross / below
