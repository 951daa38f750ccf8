"""Random masks on budget: the floor that every other method has to clear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from depthsearch.searchers.options import at_least
from depthsearch.searchers.staged import Plan, best_masks
from depthsearch.space import Batch, Evaluation, Mask, Proposal, SearchSpace

_TRIES_A_MASK = 20
_LEAST_TRIES = 320
_MOST_SPARING = 2.0
"""The largest power of what a gene frees that its key is multiplied by when draws ran dry."""


@dataclass(frozen=True)
class RandomOptions:
    """How many masks a batch holds, and how many of the best must be known exactly."""

    batch: int = 16
    survivors: int = 4

    def __post_init__(self) -> None:
        at_least(self, batch=1, survivors=1)


def random_plan(space: SearchSpace, rng: np.random.Generator, options: RandomOptions) -> Plan:
    """Batches of new random masks until none is left."""
    fresh = FreshMasks(space, rng)
    known: list[Evaluation] = []
    while masks := fresh.take(options.batch):
        answers = yield Batch(
            tuple(Proposal(mask, "random") for mask in masks),
            options.survivors,
            best_masks(known, options.survivors),
        )
        known.extend(answers.values())


class FreshAtAny:
    """`FreshMasks` at every point of a space in turn; a mask that is new is new at all of them."""

    def __init__(self, space: SearchSpace, rng: np.random.Generator) -> None:
        self._points = [FreshMasks(point, rng) for point in space.points]

    @property
    def listed(self) -> bool:
        """Whether the masks at every point were listed."""
        return all(point.listed for point in self._points)

    def add(self, mask: Mask) -> bool:
        """Mark a mask as used; False where it was used already."""
        new = [point.add(mask) for point in self._points]
        return all(new)

    def __contains__(self, mask: Mask) -> bool:
        return mask in self._points[0]

    def take(self, count: int) -> list[Mask]:
        """At most `count` new masks, from the first point that has any left."""
        found: list[Mask] = []
        for point in self._points:
            new = point.take(count - len(found)) if len(found) < count else []
            found += new
            for other in self._points:
                for mask in new:
                    other.add(mask)
        return found


class FreshMasks:
    """Random masks on budget, none of them twice, until the space is exhausted.

    Masks used elsewhere are handed in through `add`. When random draws bring nothing new, what is
    left is listed. On a space too large for that further draws spare what is heavy: where one heavy
    gene frees what the budget needs, keys drawn alike nearly always drop one. The space counts as
    exhausted for as long as these are dry as well.
    """

    def __init__(self, space: SearchSpace, rng: np.random.Generator) -> None:
        self._space = space
        self._rng = rng
        self._seen: set[Mask] = set()
        self._left: Iterator[Mask] | None = None
        self._large = False

    @property
    def listed(self) -> bool:
        """Whether draws ran dry on a space small enough to list, so that the list is used up."""
        return self._left is not None

    def add(self, mask: Mask) -> bool:
        """Mark a mask as used; False where it was used already."""
        if mask in self._seen:
            return False
        self._seen.add(mask)
        return True

    def __contains__(self, mask: Mask) -> bool:
        return mask in self._seen

    def take(self, count: int) -> list[Mask]:
        """At most `count` new masks; fewer, or none, when no more are found."""
        found = list(self._drawn(count))
        if len(found) < count:
            found.extend(self._list(count - len(found)))
        if len(found) < count and self._large:
            found.extend(self._drawn(count - len(found), sparing=True))
        return found

    def _drawn(self, count: int, sparing: bool = False) -> Iterator[Mask]:
        """At most `count` new masks from random keys; `sparing` ones are higher for heavy genes."""
        tries = max(_LEAST_TRIES if self._large else 0, _TRIES_A_MASK * count)
        while count and tries and self._left is None:
            tries -= 1
            keys = self._rng.random(len(self._space.genes))
            if sparing:
                keys *= self._sizes ** self._rng.uniform(0.0, _MOST_SPARING)
            mask = self._space.decode(keys.tolist())
            if self.add(mask):
                count -= 1
                yield mask

    @cached_property
    def _sizes(self) -> npt.NDArray[np.float64]:
        """What each gene frees alone, as a share of the dense cost; at two costs, the larger."""
        keep, limits = self._space.dense.keep, self._space.limits
        return np.array(
            [
                max(limit.weight(keep, gene) / max(1, limit.dense) for limit in limits)
                for gene in self._space.genes
            ]
        )

    def _list(self, count: int) -> Iterator[Mask]:
        if self._left is None and not self._large:
            masks = self._space.enumerate()
            self._large = masks is None
            if masks is not None:
                self._left = iter([masks[i] for i in self._rng.permutation(len(masks))])
        if self._left is None:
            return
        for _ in range(count):
            mask = next((m for m in self._left if self.add(m)), None)
            if mask is None:
                return
            yield mask
