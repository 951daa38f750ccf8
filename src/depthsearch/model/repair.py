"""What repairs change: the weight with which a sublayer writes to the residual stream.

A sublayer writes `z W^T` to the stream, so its output projection W is what is refitted. Some
families multiply it by a number first, which is only a matter of scale (Granite). Where a norm
stands between the two (Gemma 2 and 3, OLMo 2), the stream gets `z W^T / r * g` with r the root mean
square of a token's `z W^T`. With r as the old W has it that is linear in W; the new W changes r,
which the norm's weight g makes good on average. A new weight takes the place of the old one: no
parameter is added and no format changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from depthsearch.errors import UnsupportedModelError
from depthsearch.model.anatomy import Anatomy
from depthsearch.space import Site

REACH = 0.3
"""Channels of a norm are refitted less the further g is below this share of its root mean square.

Where g is small, W must change much to move the stream a little, and r would no longer be the old
one. On tiny models with weights from about 0.03 to 3 the share of the error that was left was then
at most 0.03 above what the normal equations say; with 0 in its place it was up to 0.34."""


@dataclass(frozen=True)
class Patch:
    """A refitted output projection of one site: weight `[out, in]`, bias `[out]` where it has one.

    `norm` `[out]` is the weight, as stored, of the norm behind it, where there is one. `left` is
    the share of the squared error of the stream that is left on tokens held back from the fit (by
    the normal equations, so with the old r where there is a norm), and `ridge` the strength chosen
    on them: None where nothing was held back.
    """

    site: int
    weight: Tensor
    bias: Tensor | None
    ridge: float | None
    left: float | None
    norm: Tensor | None = None


@dataclass(frozen=True)
class Projection:
    """The module of one site that writes to the residual stream, and the norm behind it.

    `factor` is what its output is multiplied by behind all that.
    """

    site: Site
    module: nn.Module
    norm: nn.Module | None = None
    factor: float = 1.0

    @property
    def transposed(self) -> bool:
        """Whether the module keeps its weight as `[in, out]` (GPT-2)."""
        return type(self.module).__name__ == "Conv1D"

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, whatever the module's own layout."""
        weight = _parameter(self.module, "weight")
        assert weight is not None
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """`[out]`, None where there is none."""
        return _parameter(self.module, "bias")

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of `stacked`."""
        out, wide = self.weight.shape
        return wide + (self.bias is not None), out

    @property
    def stacked(self) -> Tensor:
        """Weight and bias in float64, `[in, out]` with the bias as one more row."""
        rows = self.weight.double().T
        return rows if self.bias is None else torch.cat([rows, self.bias.double().unsqueeze(0)])

    @property
    def gains(self) -> Tensor:
        """What multiplies each output on its way to the stream, float64 `[out]`."""
        if self.norm is None:
            return self.weight.new_full((self.shape[1],), self.factor, dtype=torch.float64)
        return self.factor * self._norm_weight()

    def _norm_weight(self) -> Tensor:
        """g, float64 `[out]`."""
        assert self.norm is not None
        stored = _parameter(self.norm, "weight")
        assert stored is not None
        return stored.double() + _offset(self.norm, stored)

    @torch.no_grad()
    def regressors(self, inputs: Tensor) -> Tensor:
        """What `stacked * gains` multiplies, float32 `[token, in (+ 1)]`, for inputs `[token, in]`.

        The inputs, with a column of ones for a bias, over each token's r where there is a norm.
        """
        z = inputs.float()
        if self.bias is not None:
            z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
        if self.norm is None:
            return z
        outputs = self.module(inputs).float()
        sizes = [t.norm(dim=-1, keepdim=True) for t in (_normed(self.norm, outputs), outputs)]
        scaled: Tensor = z * (sizes[0] / sizes[1].clamp_min(1e-30))
        return scaled

    def reached(self, change: Tensor) -> Tensor:
        """The part of a change of `stacked * gains` that is made, see `REACH`."""
        if self.norm is None:
            return change
        squares = self.gains.square()
        return change * (squares / (squares + REACH**2 * squares.mean()).clamp_min(1e-30))

    def patch(self, change: Tensor, gram: Tensor, ridge: float, left: float) -> Patch:
        """The patch of a change of `stacked * gains`, float64 `[in (+ 1), out]`.

        `gram` is that of the `regressors`.
        """
        old, gains = self.stacked, self.gains
        new = old + change / torch.where(gains == 0, torch.inf, gains)
        if self.norm is None:
            return self._as_patch(new, None, ridge, left)
        grown = ((new * (gram @ new)).sum() / (old * (gram @ old)).sum()).sqrt()
        return self._as_patch(new, self._norm_weight() * grown, ridge, left)

    def divided(self, by: float) -> Patch:
        """The patch with which what is written to the stream is divided by a number."""
        if self.norm is None:
            return self._as_patch(self.stacked / by, None, None, None)
        return self._as_patch(self.stacked, self._norm_weight() / by, None, None)

    def _as_patch(
        self, stacked: Tensor, g: Tensor | None, ridge: float | None, left: float | None
    ) -> Patch:
        bias = norm = None
        if self.bias is not None:
            stacked, bias = stacked[:-1], stacked[-1].to(self.bias.dtype)
        if self.norm is not None and g is not None:
            stored = _parameter(self.norm, "weight")
            assert stored is not None
            norm = (g - _offset(self.norm, stored)).to(stored.dtype)
        weight = stacked.T.to(self.weight.dtype).contiguous()
        return Patch(self.site.index, weight, bias, ridge, left, norm)


def projection_of(model: nn.Module, anatomy: Anatomy, site: Site) -> Projection:
    """The output projection of `site`, and the norm behind it.

    Raises UnsupportedModelError where the one is no matrix, or the other no vector.
    """
    number = anatomy.block_of(site)
    row, block = anatomy.rows[number], anatomy.block_list(model)[number]
    norms = row.norms(site.kind)
    if row.post_norm:
        raise UnsupportedModelError(
            f"{anatomy.model_class} normalizes the stream behind every sublayer, so no weight of "
            "one makes good for another exactly: set search.repair and search.finish to none"
        )
    found: list[nn.Module] = []
    parts = [(row.projection(site.kind), "matrix", 2)]
    if row.norm_after:
        parts.append((norms[-1], "vector", 1))
    for path, shape, dimensions in parts:
        module = block.get_submodule(path)
        weight = _parameter(module, "weight")
        if weight is None or weight.ndim != dimensions:
            raise UnsupportedModelError(
                f"{anatomy.model_class}: '{path}' of {site.name} holds no {shape}, so it can't be "
                "refitted: set search.repair and search.finish to none"
            )
        found.append(module)
    factor = 1.0 if row.factor is None else float(getattr(block, row.factor))
    return Projection(site, found[0], found[1] if row.norm_after else None, factor)


@contextmanager
def patched(model: nn.Module, anatomy: Anatomy, patches: Sequence[Patch]) -> Iterator[None]:
    """The model with refitted weights; restores the old ones on leaving, also on an error."""
    saved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for patch in patches:
            projection = projection_of(model, anatomy, anatomy.sites[patch.site])
            weight = patch.weight.T.contiguous() if projection.transposed else patch.weight
            changes = (
                (projection.module, "weight", weight),
                (projection.module, "bias", patch.bias),
                (projection.norm, "weight", patch.norm),
            )
            for module, name, value in changes:
                parameter = getattr(module, name, None)
                if value is not None and isinstance(parameter, nn.Parameter):
                    saved.append((parameter, parameter.data))
                    parameter.data = value.to(parameter.device)
        yield
    finally:
        for parameter, data in reversed(saved):
            parameter.data = data


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    found = getattr(module, name, None)
    return found.data if isinstance(found, nn.Parameter) else None


def _normed(norm: nn.Module, inputs: Tensor) -> Tensor:
    """What a norm makes of float32 inputs `[token, channel]` with every weight one."""
    # A difference, since some norms add something to their weight.
    return _with_weight(norm, 1.0, inputs) - _with_weight(norm, 0.0, inputs)


def _offset(norm: nn.Module, stored: Tensor) -> float:
    """What a norm adds to its stored weight before it multiplies: 1 in Gemma's, else 0."""
    inputs = torch.arange(1, len(stored) + 1, device=stored.device).float().unsqueeze(0)
    whole = _normed(norm, inputs)
    return float((_with_weight(norm, 0.0, inputs) * whole).sum() / whole.square().sum())


@torch.no_grad()
def _with_weight(norm: nn.Module, value: float, inputs: Tensor) -> Tensor:
    stored = getattr(norm, "weight")
    weight = torch.full_like(stored, value, dtype=torch.float32)
    found: Tensor = torch.func.functional_call(norm, {"weight": weight}, (inputs,))
    return found
