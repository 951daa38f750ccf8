"""The unit of evaluation work, and who can do it.

A unit is one calibration batch with a set of masks; it yields losses `[mask, sequence]`. Batches
are composed once, so a unit's result does not depend on who computes it or when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from depthsearch.space import Hints, Mask, Sensitivity, Status


@dataclass(frozen=True)
class UnitResult:
    """One unit done: for each mask its status and losses by sequence (empty after a failure).

    `cost_tokens` are the dense-equivalent tokens executed: sites executed weighted by their FLOPs,
    output head included, over the FLOPs of one token through the dense model. `costs` are those of
    each mask where masks share nothing and what they cost is only known afterwards.
    """

    losses: tuple[tuple[float, ...], ...]
    statuses: tuple[Status, ...]
    cost_tokens: float
    costs: tuple[float, ...] = ()


class Backend(Protocol):
    """Computes units; in-process or on a cluster."""

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences in each batch."""
        ...

    @property
    def window_tokens(self) -> int:
        """Tokens of one sequence."""
        ...

    @property
    def preparation(self) -> float:
        """The `cost_tokens` of the one dense pass that records every batch."""
        ...

    def run(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int] = (), *, sure: bool = True
    ) -> UnitResult:
        """Compute one unit.

        `ahead` are the batches asked for next, for all these masks where it is `sure`, for those
        that a race leaves otherwise: a backend may begin with them while it has nothing better.
        """
        ...

    def plan(self, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of evaluating `masks` on every batch, at most, nothing computed."""
        ...

    def once(self, masks: Sequence[Mask]) -> float:
        """The part of `plan` that is paid once in a search, whenever it is first needed."""
        ...

    def prepare(self, masks: Sequence[Mask]) -> float:
        """`once`, which counts as paid from now on and is not part of `plan` any more.

        Called once for all masks of one ask, in the order of asks, whether they are evaluated now
        or were before. Computes nothing.
        """
        ...

    def hints(self) -> tuple[Hints, float]:
        """Similarities of the dense residual stream, and the `cost_tokens` they took."""
        ...

    def sensitivity(self) -> tuple[Sensitivity, float]:
        """First-order estimates of what each site is worth, and the `cost_tokens` they took.

        Raises ModelError where there are no gradients to be had.
        """
        ...
