"""What repairs change: the last weight of a sublayer before its output joins the residual stream.

A sublayer writes `z W^T` to the stream, so its output projection W is what is refitted. Where a
norm stands between the two (Gemma 2 and 3, OLMo 2), the stream gets `norm(z W^T) * g`, which is not
linear in W but is in the norm's weight g, channel by channel: there g is refitted. A new weight
takes the place of the old one: no parameter is added and no format changes.
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


@dataclass(frozen=True)
class Patch:
    """A refitted weight of one site, as `Projection.weight` and `bias` lay it out.

    `[out, in]` for an output projection, `[channel]` for the norm behind one; a bias `[out]` where
    there is one to refit. `left` is the share of the squared error of the stream that is left on
    tokens held back from the fit, and `ridge` the strength chosen on them: None where nothing was
    held back.
    """

    site: int
    weight: Tensor
    bias: Tensor | None
    ridge: float | None
    left: float | None


@dataclass(frozen=True)
class Projection:
    """The module of one site that writes to the residual stream: a projection, or a norm."""

    site: Site
    module: nn.Module

    @property
    def is_norm(self) -> bool:
        """Whether the module is a norm, whose weight holds one number a channel."""
        return self.weight.ndim == 1

    @property
    def transposed(self) -> bool:
        """Whether the module keeps its weight as `[in, out]` (GPT-2)."""
        return type(self.module).__name__ == "Conv1D"

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, whatever the module's own layout; `[channel]` as stored for a norm."""
        weight = self._parameter("weight")
        assert weight is not None
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """`[out]`, None where there is none."""
        return self._parameter("bias")

    @property
    def offset(self) -> float:
        """What the module adds to its weight before it multiplies: 1 in Gemma's norms, else 0."""
        if not self.is_norm:
            return 0.0
        steps = torch.arange(1, len(self.weight) + 1, device=self.weight.device)
        inputs = steps.float().unsqueeze(0)
        added = self._with_weight(0.0, inputs) * self.regressors(inputs)
        return float(added.sum() / self.regressors(inputs).square().sum())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `stacked`."""
        if self.is_norm:
            return tuple(self.weight.shape)
        out, wide = self.weight.shape
        return wide + (self.bias is not None), out

    @property
    def stacked(self) -> Tensor:
        """What is fitted, in float64: `[in, out]` with the bias as one more row, or `[channel]`."""
        weight = self.weight.double()
        if self.is_norm:
            return weight
        rows = weight.T
        return rows if self.bias is None else torch.cat([rows, self.bias.double().unsqueeze(0)])

    def regressors(self, inputs: Tensor) -> Tensor:
        """What `stacked` multiplies, in float32, for what the module is given `[token, in]`.

        For a projection the inputs with a column of ones for its bias, `[token, in (+ 1)]`; for a
        norm its output with every weight one, `[token, channel]`.
        """
        z = inputs.float()
        if self.is_norm:
            # A difference, since some norms add something to their weight or to their output.
            return self._with_weight(1.0, z) - self._with_weight(0.0, z)
        return z if self.bias is None else torch.cat([z, torch.ones_like(z[:, :1])], dim=1)

    def patch(self, stacked: Tensor, ridge: float | None, left: float | None) -> Patch:
        """The patch of new values laid out as `stacked`."""
        dtype, bias = self.weight.dtype, None
        if self.is_norm:
            return Patch(self.site.index, stacked.to(dtype), None, ridge, left)
        if self.bias is not None:
            stacked, bias = stacked[:-1], stacked[-1].to(self.bias.dtype)
        return Patch(self.site.index, stacked.T.to(dtype).contiguous(), bias, ridge, left)

    def divided(self, by: float) -> Patch:
        """The patch with which what is written to the stream is divided by a number."""
        return self.patch((self.stacked + self.offset) / by - self.offset, None, None)

    @torch.no_grad()
    def _with_weight(self, value: float, inputs: Tensor) -> Tensor:
        weight = torch.full_like(self.weight, value, dtype=torch.float32)
        found: Tensor = torch.func.functional_call(self.module, {"weight": weight}, (inputs,))
        return found

    def _parameter(self, name: str) -> Tensor | None:
        found = getattr(self.module, name, None)
        return found.data if isinstance(found, nn.Parameter) else None


def projection_of(model: nn.Module, anatomy: Anatomy, site: Site) -> Projection:
    """What a repair of `site` refits: its output projection, or the norm behind that.

    Raises UnsupportedModelError where the one is no matrix, or the other no vector.
    """
    row = anatomy.stack.row
    names, norms = (row.attention, row.attention_out), row.attention_norms
    if site.kind == "ffn":
        names, norms = (row.ffn, row.ffn_out), row.ffn_norms
    path, shape, dimensions = ".".join(names), "matrix", 2
    if row.norm_after:
        path, shape, dimensions = norms[-1], "vector", 1
    module = anatomy.block_list(model)[site.block].get_submodule(path)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != dimensions:
        raise UnsupportedModelError(
            f"{anatomy.model_class}: '{path}' of {site.name} holds no {shape}, so it can't be "
            "refitted: set search.repair to none"
        )
    return Projection(site, module)


@contextmanager
def patched(model: nn.Module, anatomy: Anatomy, patches: Sequence[Patch]) -> Iterator[None]:
    """The model with refitted weights; restores the old ones on leaving, also on an error."""
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
