"""Closed-form repair: output projections refitted so that a cut model follows the dense one.

A sublayer writes `z W^T` to the residual stream. Where sublayers after it are gone, W is refitted
by ridge least squares, so that the stream comes as close as it can to the dense model's behind the
gap. The new weight takes the place of the old one: no parameter is added and no format changes.
Nearest in print: ReplaceMe (arXiv 2505.02819), which folds one map into one projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from depthsearch.errors import UnsupportedModelError
from depthsearch.model.anatomy import Anatomy
from depthsearch.space import Site

RIDGES = (0.03, 0.1, 0.3, 1.0)
"""Strengths tried on held-back tokens, relative to the mean of the Gram matrix' diagonal."""


@dataclass(frozen=True)
class Patch:
    """A refitted output projection of one site: weight `[out, in]`, bias `[out]` where it has one.

    `left` is the share of the squared error of the stream that is left on tokens held back from
    the fit, and `ridge` the strength chosen on them.
    """

    site: int
    weight: Tensor
    bias: Tensor | None
    ridge: float
    left: float


@dataclass(frozen=True)
class Projection:
    """The module of one site that writes to the residual stream."""

    site: Site
    module: nn.Module

    @property
    def transposed(self) -> bool:
        """Whether the module keeps its weight as `[in, out]` (GPT-2)."""
        return type(self.module).__name__ == "Conv1D"

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, whatever the module's own layout."""
        weight = self._parameter("weight")
        assert weight is not None
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """`[out]`, None where there is none."""
        return self._parameter("bias")

    def _parameter(self, name: str) -> Tensor | None:
        found = getattr(self.module, name, None)
        return found.data if isinstance(found, nn.Parameter) else None


def projection_of(model: nn.Module, anatomy: Anatomy, site: Site) -> Projection:
    """The output projection of `site`.

    Raises UnsupportedModelError where it is no matrix, or where a norm stands between it and the
    residual stream, so that what it writes is not linear in its weight.
    """
    row = anatomy.stack.row
    names = (row.attention, row.attention_out)
    if site.kind == "ffn":
        names = (row.ffn, row.ffn_out)
    module = anatomy.block_list(model)[site.block].get_submodule(".".join(names))
    weight = getattr(module, "weight", None)
    if row.norm_after:
        raise UnsupportedModelError(
            f"{anatomy.model_class} has a norm behind each sublayer, so its projections can't be "
            "refitted in closed form yet: set search.repair to none"
        )
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise UnsupportedModelError(
            f"{anatomy.model_class}: '{'.'.join(names)}' of {site.name} holds no matrix, so it "
            "can't be refitted: set search.repair to none"
        )
    return Projection(site, module)


@contextmanager
def patched(model: nn.Module, anatomy: Anatomy, patches: Sequence[Patch]) -> Iterator[None]:
    """The model with refitted projections; restores the weights on leaving, also on an error."""
    saved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for patch in patches:
            projection = projection_of(model, anatomy, anatomy.sites[patch.site])
            weight = patch.weight.T.contiguous() if projection.transposed else patch.weight
            for name, value in (("weight", weight), ("bias", patch.bias)):
                parameter = getattr(projection.module, name, None)
                if value is not None and isinstance(parameter, nn.Parameter):
                    saved.append((parameter, parameter.data))
                    parameter.data = value.to(parameter.device)
        yield
    finally:
        for parameter, data in reversed(saved):
            parameter.data = data


class Normal:
    """Normal equations of one projection for several targets, summed over tokens in float64.

    `gram` is `[in, in]`, `cross[target]` `[in, out]` of the inputs and what the stream lacks, and
    `energy[target]` the summed square of what it lacks. A bias is one more input that is always 1.
    """

    def __init__(self, projection: Projection, targets: Sequence[int]) -> None:
        outputs, inputs = projection.weight.shape
        self._bias = projection.bias is not None
        width = inputs + self._bias
        like = torch.zeros((), dtype=torch.float64, device=projection.weight.device)
        self.gram = like.new_zeros(width, width)
        self.cross = {target: like.new_zeros(width, outputs) for target in targets}
        self.energy = dict.fromkeys(targets, 0.0)

    def add(self, inputs: Tensor, lacking: dict[int, Tensor], weights: Tensor) -> None:
        """Add tokens: inputs `[token, in]`, `lacking[target]` `[token, out]`, weights `[token]`."""
        root = weights.sqrt().unsqueeze(-1)
        z = inputs.float()
        if self._bias:
            z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
        z = z * root
        self.gram += (z.T @ z).double()
        for target, lack in lacking.items():
            error = lack.float() * root
            self.cross[target] += (z.T @ error).double()
            self.energy[target] += float(error.double().square().sum())

    def left(self, target: int, change: Tensor) -> float:
        """The share of the error that is left with `change` `[in, out]` added to the weight."""
        gained = 2 * (change * self.cross[target]).sum() - (change * (self.gram @ change)).sum()
        return 1.0 - float(gained) / max(self.energy[target], 1e-300)


class Operator(Protocol):
    """A way to change a projection, given the normal equations of what the stream lacks."""

    def __call__(self, normal: Normal, target: int, weight: Tensor, ridge: float) -> Tensor | None:
        """The change `[in, out]` of a weight `[in, out]`, in float64; None if ill-conditioned."""
        ...


def refit(normal: Normal, target: int, weight: Tensor, ridge: float) -> Tensor | None:
    """Ridge least squares for the whole matrix, pulled towards the old weight."""
    return _solve(normal.gram, normal.cross[target], ridge)


def folded_map(normal: Normal, target: int, weight: Tensor, ridge: float) -> Tensor | None:
    """One `[out, out]` map behind the projection, folded into it (ReplaceMe, section 2)."""
    gram = weight.T @ normal.gram @ weight
    change = _solve(gram, weight.T @ normal.cross[target], ridge)
    return None if change is None else weight @ change


def per_channel(normal: Normal, target: int, weight: Tensor, ridge: float) -> Tensor | None:
    """One factor for each output channel, for very little text."""
    above = (weight * normal.cross[target]).sum(0)
    below = (weight * (normal.gram @ weight)).sum(0)
    factors: Tensor = above / (below + ridge * below.mean())
    return weight * factors.unsqueeze(0)


OPERATORS: dict[str, Operator] = {
    "refit": refit,
    "map": folded_map,
    "channel": per_channel,
}


def solved(
    projection: Projection, fit: Normal, held: Normal, target: int, operator: Operator
) -> Patch | None:
    """The projection refitted for one target, the ridge chosen on the tokens held back.

    The chosen ridge is then used on all tokens. None where the weight is better left alone: where
    no ridge lowers the error of the held-back tokens, or every solve is ill-conditioned.
    """
    weight, bias = projection.weight, projection.bias
    old = weight.double().T
    if bias is not None:
        old = torch.cat([old, bias.double().unsqueeze(0)])
    best: tuple[float, float] | None = None
    for ridge in RIDGES:
        change = operator(fit, target, old, ridge)
        left = 1.0 if change is None else held.left(target, change)
        if left < (1.0 if best is None else best[0]):
            best = (left, ridge)
    if best is None:
        return None
    left, ridge = best
    total = Normal(projection, [target])
    for part in (fit, held):
        total.gram += part.gram
        total.cross[target] += part.cross[target]
    change = operator(total, target, old, ridge)
    if change is None:
        return None
    new = old + change
    new_bias = None
    if bias is not None:
        new, new_bias = new[:-1], new[-1].to(bias.dtype)
    return Patch(projection.site.index, new.T.to(weight.dtype).contiguous(), new_bias, ridge, left)


def token_weights(dense: Tensor) -> Tensor:
    """Weights `[token]` that make errors relative: one over the mean square of `[token, hidden]`.

    The norms of what follows are blind to the size of a token's stream, so a first token with
    massive activations must count no more than any other.
    """
    return 1.0 / dense.float().square().mean(-1).clamp_min(1e-12)


def _solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor | None:
    strength = ridge * gram.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(
        gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    )
    return None if int(failed) else torch.cholesky_solve(right, factor)
