"""What a backend whose units are computed elsewhere leaves to one of this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from depthsearch.evaluation.backend import Backend
from depthsearch.space import Hints, Mask, Sensitivity


class Planner(Backend, Protocol):
    """A backend of this process, which knows what a unit costs without computing it."""

    def unit_cost(self, batch: int, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of one unit with nothing split or failing, nothing computed."""
        ...


P = TypeVar("P", bound=Planner)


class Planned(Generic[P]):
    """All of a `Backend` but `run`, as `planner` has it: the same text in this process."""

    def __init__(self, planner: P) -> None:
        self._planner = planner

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences in each batch."""
        return self._planner.sequences

    @property
    def window_tokens(self) -> int:
        """Tokens of one sequence."""
        return self._planner.window_tokens

    @property
    def preparation(self) -> float:
        """The `cost_tokens` of the dense pass that is made once."""
        return self._planner.preparation

    def plan(self, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of evaluating `masks` on every batch, nothing computed."""
        return self._planner.plan(masks)

    def once(self, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` that `masks` need once, not counted yet."""
        return self._planner.once(masks)

    def prepare(self, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` that `masks` need once."""
        return self._planner.prepare(masks)

    def hints(self) -> tuple[Hints, float]:
        """Similarities of the dense residual stream, computed by this process."""
        return self._planner.hints()

    def sensitivity(self) -> tuple[Sensitivity, float]:
        """First-order estimates of what each site is worth, computed by this process."""
        return self._planner.sensitivity()
