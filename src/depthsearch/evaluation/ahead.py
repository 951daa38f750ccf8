"""Units computed together with those that are asked for next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from depthsearch.evaluation.backend import UnitResult
from depthsearch.space import Mask, Status

Found = Mapping[tuple[int, Mask], tuple[tuple[float, ...], Status]]
"""Losses by sequence and status, by batch and mask."""


class Ahead:
    """Hands out units one by one of what `compute(batches, masks)` finds for all of them at once.

    What a race ends early is computed, but not counted.
    """

    def __init__(self, compute: Callable[[Sequence[int], Sequence[Mask]], Found]) -> None:
        self._compute = compute
        self._held: dict[tuple[int, Mask], tuple[tuple[float, ...], Status]] = {}

    def unit(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int], cost_tokens: float
    ) -> UnitResult:
        """One unit; where it is not there yet it is computed with all that lie `ahead`."""
        if any((batch, mask) not in self._held for mask in masks):
            self._held = {}
            self._held = dict(self._compute([batch, *ahead], masks))
        found = [self._held[batch, mask] for mask in masks]
        for mask in masks:
            self._held.pop((batch, mask), None)
        return UnitResult(
            tuple(losses for losses, _ in found),
            tuple(status for _, status in found),
            cost_tokens,
        )
