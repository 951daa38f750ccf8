"""Cutting what is asked for into units: where a run of masks is parted, and what the parts cost.

Masks in the order of their keys are the leaves of a trie, so a run of neighbours shares most, and
the price of a cut is the prefix that its two sides have in common: it is executed twice. Costs are
counted in executed sublayers; the head, which nothing shares, counts as one. They only steer who
computes what; no record holds them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from depthsearch.space import Mask

HEAD = 1
"""What the head costs for one mask, in sublayers."""

_SHORTEST = 0.7
_LONGEST = 1.2


class Sheet:
    """Distinct masks of one length, sorted by key, and the cost of every run `[start, stop)`.

    `record` is about what it costs to meet a batch, which takes a dense pass, and compute one mask.
    """

    def __init__(self, masks: Iterable[Mask]) -> None:
        self.masks = tuple(sorted(masks, key=lambda mask: mask.key))
        bits = [int(mask.key, 2) for mask in self.masks]
        self.shared = [0] + [(a >> (a ^ b).bit_length()).bit_count() for a, b in pairwise(bits)]
        alone = [found.bit_count() + HEAD for found in bits]
        self.record = len(self.masks[0]) + alone[0]
        own = (a - b for a, b in zip(alone, self.shared, strict=True))
        self._sums = [0, *accumulate(own)]
        self._saved = [0, *accumulate(self.shared)]
        # Ascending: what a mask has in common with the one before, that one executes too.
        self._begins = [a - b for a, b in zip(self._sums, self.shared, strict=False)]

    def cost(self, start: int, stop: int) -> int:
        """Sublayers executed for the masks `[start, stop)` in one unit, prefixes shared."""
        return self._sums[stop] - self._sums[start] + self.shared[start]

    def cut(self, start: int, stop: int, target: float) -> tuple[int, int]:
        """The end of a run, first or last, to take off as a unit that costs about `target`.

        It is the one whose masks share most with each other and least with the rest, so that what
        remains loses little when it is parted in turn. At least one mask; all of a run that costs
        not much more than the target.
        """
        if stop - start == 1 or self.cost(start, stop) <= _LONGEST * target:
            return start, stop
        return max(
            (self._first(start, stop, target), self._last(start, stop, target)),
            key=lambda part: self._gain(start, stop, *part),
        )

    def _first(self, start: int, stop: int, target: float) -> tuple[int, int]:
        """Part a run after its first masks, near the target where neighbours share least."""
        begin = self._sums[start] - self.shared[start]
        low = bisect_left(self._sums, begin + _SHORTEST * target, start + 1, stop)
        high = bisect_right(self._sums, begin + _LONGEST * target, start + 1, stop)
        if low >= high:
            return start, max(start + 1, high - 1)
        return start, min(range(low, high), key=lambda place: (self.shared[place], -place))

    def _last(self, start: int, stop: int, target: float) -> tuple[int, int]:
        """Part a run before its last masks, likewise."""
        end = self._sums[stop]
        low = bisect_left(self._begins, end - _LONGEST * target, start + 1, stop)
        high = bisect_right(self._begins, end - _SHORTEST * target, start + 1, stop)
        if low >= high:
            return min(stop - 1, low), stop
        return min(range(low, high), key=lambda place: (self.shared[place], place)), stop

    def _gain(self, start: int, stop: int, first: int, last: int) -> int:
        """What the masks of a part share with each other, less what they share with the rest."""
        lost = self.shared[first if first > start else last]
        return self._saved[last] - self._saved[first + 1] - lost


@dataclass(eq=False, slots=True)
class Run:
    """Neighbours of a sheet that nobody computes yet, on one batch.

    `tried` are the workers that failed with them; such a run is not cut. `cost` are the sublayers
    executed for it in one unit. Never changed; not frozen, because many are made for every ask.
    """

    batch: int
    sheet: Sheet
    start: int
    stop: int
    tried: frozenset[str] = frozenset()
    cost: int = field(init=False)

    def __post_init__(self) -> None:
        self.cost = self.sheet.cost(self.start, self.stop)

    @classmethod
    def of(cls, batch: int, masks: Sequence[Mask], tried: Iterable[str] = ()) -> Run:
        """All of `masks`, on a sheet of their own."""
        return cls(batch, Sheet(masks), 0, len(masks), frozenset(tried))

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The masks, sorted by key."""
        return self.sheet.masks[self.start : self.stop]


class Pool:
    """The runs of one ask that wait for a worker, in the order of their batches; `cost` of all."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self.cost = 0

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def add(self, run: Run) -> None:
        """Append a run."""
        self._runs.append(run)
        self.cost += run.cost

    def clear(self) -> None:
        """Forget everything."""
        self._runs.clear()
        self.cost = 0

    def cost_of(self, batch: int) -> int:
        """The cost of what is left of one batch."""
        return sum(run.cost for run in self._runs if run.batch == batch)

    def take(self, run: Run, target: float, least: int = 1) -> Run:
        """Take a run out, or as much of it as costs about `target`; the rest stays.

        At least so many masks are taken, where there are as many.
        """
        place = self._runs.index(run)
        self.cost -= run.cost
        part = run.sheet.cut(run.start, run.stop, math.inf if run.tried else target)
        if part[1] - part[0] < least:
            from_front = part[0] == run.start
            part = (
                (run.start, min(run.stop, run.start + least))
                if from_front
                else (max(run.start, run.stop - least), run.stop)
            )
        if part == (run.start, run.stop):
            del self._runs[place]
            return run
        start, stop = part
        left = (stop, run.stop) if start == run.start else (run.start, start)
        rest = self._runs[place] = Run(run.batch, run.sheet, *left)
        self.cost += rest.cost
        return Run(run.batch, run.sheet, start, stop)

    def discard(self, mask: Mask) -> None:
        """Take one mask out of every run."""
        runs = list(self._runs)
        self.clear()
        for run in runs:
            left = [other for other in run.masks if other != mask]
            if len(left) == run.stop - run.start:
                self.add(run)
            elif left:
                self.add(Run.of(run.batch, left, run.tried))
