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
    """Sums over tokens of the similarities between every two places of the stream.

    Each stack has tokens of its own. What a place in one and a place in another have in common is
    the mean over the stacks, however many tokens each has.
    """

    def __init__(self, places: int, stack_ends: Sequence[int] = ()) -> None:
        self._ends = tuple(stack_ends) or (places - 1,)
        self._cosine = torch.zeros((len(self._ends), places, places), dtype=torch.float64)
        self._angular = torch.zeros_like(self._cosine)
        self._tokens = [0] * len(self._ends)

    def add(
        self,
        states: Sequence[Tensor],
        device: torch.device,
        seen: Sequence[Tensor | None] = (None,),
    ) -> None:
        """Add one batch: `[batch, seq, hidden]` a place, worked on at `device`.

        `seen[stack]` `[batch, seq]` says which tokens are that stack's; None stands for all.
        """
        for stack, mask in enumerate(seen):
            flat = [state.flatten(0, 1) if mask is None else state[mask] for state in states]
            tokens = flat[0].shape[0]
            for start in range(0, tokens, _TOKENS_AT_ONCE):
                part = torch.stack([s[start : start + _TOKENS_AT_ONCE] for s in flat], dim=1)
                unit = torch.nn.functional.normalize(part.to(device).float(), dim=-1)
                similar = (unit @ unit.transpose(1, 2)).clamp(-1, 1).double().cpu()
                self._cosine[stack] += similar.sum(0)
                self._angular[stack] += (similar.arccos() / math.pi).sum(0)
            self._tokens[stack] += tokens

    @property
    def tokens(self) -> int:
        """How many tokens were added, over all stacks."""
        return sum(self._tokens)

    def hints(self) -> Hints:
        """The means over all tokens; raises ModelError where the stream is not finite."""
        if not (self._cosine.isfinite().all() and self._angular.isfinite().all()):
            raise ModelError(
                "the hidden states of the dense model are not finite on the calibration text: load "
                "it with another model.dtype, such as float32"
            )
        return Hints(_rows(self._mean(self._cosine)), _rows(self._mean(self._angular)))

    def _mean(self, sums: Tensor) -> Tensor:
        """Over tokens; between places of one stack over its tokens alone."""
        means = [part / tokens for part, tokens in zip(sums, self._tokens, strict=True)]
        found = torch.stack(means).mean(0)
        start = 0
        for end, mean in zip(self._ends, means, strict=True):
            # The place behind a stack is where the next one begins.
            here = slice(start, end + 1)
            found[here, here] = mean[here, here]
            start = end
        return found


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(x) for x in row) for row in matrix.tolist())
