"""The points of a front: who is judged again for each budget, and what is chosen there.

Without a front there is one point, the budget of the space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from statistics import fmean
from typing import Any

from depthsearch.searchers import is_baseline
from depthsearch.space import Evaluation, Mask, SearchSpace, Status

Choose = Callable[[Sequence[Evaluation], Sequence[Mask]], Evaluation]
"""What picks one of the finalists, given which of them are baselines."""


@dataclass(frozen=True)
class FrontPoint:
    """The answer at one budget; `space` is the space at that budget.

    `baseline` is the best baseline there on fresh data, None where none was judged on it.
    """

    space: SearchSpace
    best: Mask
    origin: str
    search: Evaluation
    finals: Evaluation
    baseline: Evaluation | None

    @property
    def lead(self) -> tuple[float, float] | None:
        """Loss of the baseline minus that of the answer on the same sequences, and its error.

        The mean and its standard error in nats; None without a baseline or with one sequence.
        """
        return None if self.baseline is None else paired_lead(self.finals, self.baseline)


def paired_lead(ours: Evaluation, theirs: Evaluation) -> tuple[float, float] | None:
    """How much lower `ours` is than `theirs` on the same sequences: mean and standard error."""
    gaps = [b - a for a, b in zip(ours.losses, theirs.losses, strict=True)]
    if len(gaps) < 2:
        return None
    mean = fmean(gaps)
    spread = math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
    return mean, math.sqrt(spread / len(gaps))


@dataclass(frozen=True)
class Finalists:
    """The masks to judge again: for each point the best and the best baselines first.

    `heads` holds these, a list a point, empty where nothing is known yet; `baselines` holds every
    complete baseline.
    """

    masks: list[Mask]
    baselines: list[Mask]
    heads: list[list[Mask]]

    @property
    def needed(self) -> int:
        """How many of `masks` are the best or one of the best baselines of a point."""
        return len({mask for head in self.heads for mask in head})


class Contest:
    """The masks that meet a budget, and at which points: also at every looser one."""

    def __init__(self, space: SearchSpace) -> None:
        self.points = space.points
        self.own = next(i for i, point in enumerate(self.points) if point.budget == space.budget)
        self._fits: dict[Mask, tuple[bool, ...]] = {}

    @property
    def masks(self) -> Collection[Mask]:
        """All of them, in the order they came in."""
        return self._fits.keys()

    def add(self, mask: Mask) -> None:
        """Take in a mask that is on budget at one of the points."""
        self._fits[mask] = tuple(point.fits(mask) for point in self.points)

    def at(self, place: int) -> list[Mask]:
        """The masks that don't exceed the cap of a point."""
        return [mask for mask, fits in self._fits.items() if fits[place]]

    def places(self, mask: Mask) -> list[int]:
        """The points whose cap a mask that was taken in does not exceed."""
        return [place for place, fits in enumerate(self._fits[mask]) if fits]

    def finalists(
        self,
        known: Mapping[Mask, Evaluation],
        origins: Mapping[Mask, str],
        count: int,
        baselines: int = 1,
    ) -> Finalists:
        """The best `count` of every point and its best `baselines`, the points in turn."""
        complete = sorted(
            (e for mask in self._fits if (e := known[mask]).status is Status.OK),
            key=lambda evaluation: evaluation.order,
        )
        heads: list[list[Mask]] = []
        ranks: list[list[Mask]] = []
        for place in range(len(self.points)):
            mine = [e.mask for e in complete if self._fits[e.mask][place]]
            safe = [mask for mask in mine if is_baseline(origins[mask])]
            heads.append([*mine[:1], *safe[:baselines]])
            ranks.append(mine[: max(1, count)])
        turns = [mask for row in zip_longest(*ranks) for mask in row if mask is not None]
        return Finalists(
            list(dict.fromkeys([*chain.from_iterable(heads), *turns])),
            [e.mask for e in complete if is_baseline(origins[e.mask])],
            heads,
        )

    def choices(
        self, finals: Sequence[Evaluation], baselines: Sequence[Mask], choose: Choose
    ) -> list[dict[str, Any]]:
        """For each point the chosen mask and the best baseline on fresh data, for the journal.

        None for both at a point that no finalist meets.
        """
        found: list[dict[str, Any]] = []
        for place in range(len(self.points)):
            mine = [e for e in finals if self._fits[e.mask][place] and e.status is Status.OK]
            safe = min((e for e in mine if e.mask in baselines), key=_order, default=None)
            found.append(
                {
                    "best": choose(mine, baselines).mask.key if mine else None,
                    "baseline": None if safe is None else safe.mask.key,
                }
            )
        return found

    def answers(
        self,
        choices: Sequence[Mapping[str, Any]],
        finals: Sequence[Evaluation],
        known: Mapping[Mask, Evaluation],
        origins: Mapping[Mask, str],
    ) -> tuple[FrontPoint, ...]:
        """The points that `choices` has a mask for."""
        fresh = {evaluation.mask.key: evaluation for evaluation in finals}
        found: list[FrontPoint] = []
        for point, choice in zip(self.points, choices, strict=True):
            if choice["best"] is not None:
                best = fresh[choice["best"]]
                mask = best.mask
                baseline = fresh.get(choice["baseline"])
                found.append(FrontPoint(point, mask, origins[mask], known[mask], best, baseline))
        return tuple(found)


def _order(evaluation: Evaluation) -> tuple[int, float, str]:
    return evaluation.order
