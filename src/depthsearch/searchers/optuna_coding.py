"""What the parameters and the values of an Optuna trial mean.

One float a gene ranks what is kept; decoded, the keys give a mask on budget. With a front one more
parameter names the budget that they are decoded onto, and every cost of the budgets is an objective
beside the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from depthsearch.space import Mask, SearchSpace, front_limits

BUDGET = "budget"
"""The parameter that names the budget."""


@dataclass(frozen=True)
class Coordinates:
    """Where a trial lies: one key a gene, and the place of the budget in `SearchSpace.points`."""

    keys: tuple[float, ...]
    place: int = 0


class Coding:
    """The parameters and objectives of a space; `worth` has one key a gene, higher is kept.

    `margin` is how far from 0.5 the keys of a given mask lie.
    """

    def __init__(self, space: SearchSpace, worth: Sequence[float], margin: float) -> None:
        self.points = space.points
        self._worth = worth
        self._margin = margin
        self._limits = front_limits(space) if space.front else {}
        width = max(len(str(len(space.genes) - 1)), 2)
        self.names = [f"key_{g:0{width}d}" for g in range(len(space.genes))]
        self.distributions: dict[str, BaseDistribution] = {
            name: FloatDistribution(0.0, 1.0) for name in self.names
        }
        self._texts = [point.budget.text for point in self.points]
        if self._limits:
            self.distributions[BUDGET] = CategoricalDistribution(self._texts)

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of what a study minimizes: the loss, with a front also every cost."""
        return "loss", *self._limits

    def values(self, mask: Mask, loss: float) -> list[float]:
        """The objectives of a mask."""
        return [loss, *(float(limit.cost(mask)) for limit in self._limits.values())]

    def read(self, params: Mapping[str, Any]) -> Coordinates:
        """Where a trial with these parameters lies."""
        keys = tuple(float(params[name]) for name in self.names)
        return Coordinates(keys, self._texts.index(params[BUDGET]) if self._limits else 0)

    def params(self, found: Coordinates) -> dict[str, Any]:
        """The parameters of a trial that lies there."""
        params: dict[str, Any] = dict(zip(self.names, found.keys, strict=True))
        return params | ({BUDGET: self._texts[found.place]} if self._limits else {})

    def decode(self, found: Coordinates) -> Mask:
        """The mask on budget."""
        return self.points[found.place].decode(found.keys)

    def encode(self, mask: Mask) -> Coordinates:
        """Where a trial lies that decodes to exactly this mask, at the first budget that it is on.

        `worth` breaks ties.
        """
        place = next((i for i, point in enumerate(self.points) if point.on_budget(mask)), 0)
        order = sorted(range(len(self._worth)), key=lambda g: (self._worth[g], g))
        keys = [0.0] * len(order)
        for rank, gene in enumerate(order):
            kept = mask.keep[self.points[place].genes[gene][0]]
            side = self._margin if kept else -self._margin
            keys[gene] = 0.5 + side + 0.4 * self._margin * (rank / len(order) - 0.5)
        return Coordinates(tuple(keys), place)
