"""Similarities of the dense residual stream, summed batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from depthsearch.errors import ModelError
from depthsearch.space import Hints

HINT_BATCHES = 4
"""Batches that hints are taken from, the first ones."""

_TOKENS_AT_ONCE = 128


class Similarities:
    """Sums over tokens of the similarities between every two places of the stream."""

    def __init__(self, places: int) -> None:
        self._cosine = torch.zeros((places, places), dtype=torch.float64)
        self._angular = torch.zeros_like(self._cosine)
        self.tokens = 0

    def add(self, states: Sequence[Tensor], device: torch.device) -> None:
        """Add one batch: `[batch, seq, hidden]` a place, worked on at `device`."""
        flat = [state.flatten(0, 1) for state in states]
        tokens = flat[0].shape[0]
        for start in range(0, tokens, _TOKENS_AT_ONCE):
            part = torch.stack([s[start : start + _TOKENS_AT_ONCE] for s in flat], dim=1)
            unit = torch.nn.functional.normalize(part.to(device).float(), dim=-1)
            similar = (unit @ unit.transpose(1, 2)).clamp(-1, 1).double().cpu()
            self._cosine += similar.sum(0)
            self._angular += (similar.arccos() / math.pi).sum(0)
        self.tokens += tokens

    def hints(self) -> Hints:
        """The means over all tokens; raises ModelError where the stream is not finite."""
        if not (self._cosine.isfinite().all() and self._angular.isfinite().all()):
            raise ModelError(
                "the hidden states of the dense model are not finite on the calibration text: load "
                "it with another model.dtype, such as float32"
            )
        return Hints(_rows(self._cosine / self.tokens), _rows(self._angular / self.tokens))


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(x) for x in row) for row in matrix.tolist())
