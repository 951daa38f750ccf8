"""Moves of the evolution: small changes of a mask that keep it on budget.

Swaps exchange single units. Run moves shift, resize, split, merge and slide whole stretches of
dropped genes: later layers cope better with one gap than with many, and no series of swaps that
each have to pay off leads from one stretch to another. Every move ends on budget; where an exchange
of attention for FFN breaks the budget, it is repaired next to the gaps or at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np

from depthsearch.searchers.ranking import difference
from depthsearch.space import Mask, SearchSpace

Run = tuple[int, int]

_FARTHEST_SHIFT = 3
_GUIDANCE = 2.0
"""How much likelier the least important gene is dropped than the most important: 1 + this."""


class Moves:
    """Moves on one space. `keys`, one a gene, higher meaning keep, bias what is dropped."""

    def __init__(
        self, space: SearchSpace, rng: np.random.Generator, keys: Sequence[float] | None = None
    ) -> None:
        self._space = space
        self._rng = rng
        self._step = 2 if space.packable and space.granularity == "sublayer" else 1
        self._starts = [g for g, adjoins in enumerate(space.adjoins) if not adjoins]
        self._least = {i: 1.0 for gene in space.genes for i in gene}
        self._most = dict(self._least)
        if keys is not None:
            self.guide(keys)
        self._of: dict[str, Callable[[Mask, Mask], Mask | None]] = {
            "swap": lambda mask, _: self._swap(mask, 1),
            "swaps": lambda mask, _: self._swap(mask, 1 + int(rng.geometric(0.5))),
            "shift": lambda mask, _: self._rearranged(mask, self._shift),
            "resize": lambda mask, _: self._rearranged(mask, self._resize),
            "split": lambda mask, _: self._rearranged(mask, self._split),
            "merge": lambda mask, _: self._rearranged(mask, self._merge),
            "slide": lambda mask, _: self._rearranged(mask, self._slide),
            "crossover": self._crossover,
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all moves."""
        return tuple(self._of)

    def guide(self, keys: Sequence[float]) -> None:
        """Prefer to drop genes with low keys and to put back genes with high ones, mildly."""
        genes = self._space.genes
        order = sorted(range(len(genes)), key=lambda g: (keys[g], g))
        for rank, gene in enumerate(order):
            place = rank / max(len(genes) - 1, 1)
            for i in genes[gene]:
                self._least[i] = 1 + _GUIDANCE * (1 - place)
                self._most[i] = 1 + _GUIDANCE * place

    def apply(self, name: str, mask: Mask, other: Mask) -> Mask | None:
        """A neighbour of `mask` on budget, or None where the move does not apply to it.

        `other` is a second parent, used by the crossover. The neighbour may equal the mask.
        """
        return self._of[name](mask, other)

    def migrate(self, mask: Mask) -> Mask:
        """A mask from another budget brought onto this one by dropping or putting back units.

        What looks unimportant is dropped first and put back last; half of the time no gap is opened
        or split for it, as far as that is possible.
        """
        space, compact = self._space, self._rng.random() < 0.5
        while not space.fits(mask):
            smaller = self._drop(mask, compact=compact)
            if smaller is None:
                break
            mask = smaller
        while larger := [m for m in space.additions(mask) if space.fits(m)]:
            if compact:
                gaps = self._gaps(mask)
                larger = [m for m in larger if self._gaps(m) <= gaps] or larger
            weights = [_weigh(self._most, difference(m, mask)) for m in larger]
            mask = larger[self._choose(weights)]
        return mask if space.on_budget(mask) else space.repair(mask, self._rng)

    def _swap(self, mask: Mask, count: int) -> Mask | None:
        before = mask
        for _ in range(count):
            smaller = self._drop(mask)
            if smaller is None:
                break
            mask = smaller
        gone = frozenset(difference(before, mask))
        for _ in range(count):
            larger = [m for m in self._space.additions(mask) if not _puts_back(m, mask, gone)]
            if not larger:
                break
            weights = [_weigh(self._most, difference(m, mask)) for m in larger]
            mask = larger[self._choose(weights)]
        return self._settle(mask, before)

    def _crossover(self, mask: Mask, other: Mask) -> Mask | None:
        if mask == other:
            return None
        genes, rng = self._space.genes, self._rng
        a = [float(mask.keep[gene[0]]) for gene in genes]
        b = [float(other.keep[gene[0]]) for gene in genes]
        if rng.random() < 0.5:
            # One cut keeps the runs on either side of it whole.
            cut = int(rng.integers(len(genes) + 1))
            mixed = a[:cut] + b[cut:]
        else:
            mixed = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
        noise = rng.random(len(genes)) * 0.5
        return self._space.decode([x + float(e) for x, e in zip(mixed, noise, strict=True)])

    def _rearranged(
        self, mask: Mask, change: Callable[[list[bool], list[Run]], list[bool] | None]
    ) -> Mask | None:
        """Apply a change to the genes' keep flags and their runs of dropped genes."""
        genes = self._space.genes
        kept = [mask.keep[gene[0]] for gene in genes]
        runs = self._runs(kept)
        if not runs:
            return None
        changed = change(kept, runs)
        if changed is None:
            return None
        gone = [i for gene, keep in zip(genes, changed, strict=True) if not keep for i in gene]
        return self._settle(self._space.dense.without(gone), mask)

    def _shift(self, kept: list[bool], runs: list[Run]) -> list[bool] | None:
        start, stop = runs[self._below(len(runs))]
        amount = (1 + self._below(_FARTHEST_SHIFT)) * (1 if self._rng.random() < 0.5 else -1)
        return _moved(kept, (start, stop), start + amount)

    def _slide(self, kept: list[bool], runs: list[Run]) -> list[bool] | None:
        run = max(runs, key=lambda r: r[1] - r[0])
        return _moved(kept, run, self._below(len(kept) - (run[1] - run[0]) + 1))

    def _resize(self, kept: list[bool], runs: list[Run]) -> list[bool] | None:
        """Grow one end of a run, shrink an end of another, or only one of the two."""
        kept = list(kept)
        size = self._step * (1 + self._below(_FARTHEST_SHIFT))
        grow, shrink = ((True, True), (True, False), (False, True))[self._below(3)]
        first = self._below(len(runs))
        second = (first + 1 + self._below(len(runs) - 1)) % len(runs) if len(runs) > 1 else first
        if grow:
            start, stop = runs[first]
            span = (
                range(stop, stop + size) if self._rng.random() < 0.5 else range(start - size, start)
            )
            for g in span:
                if 0 <= g < len(kept):
                    kept[g] = False
        if shrink:
            start, stop = runs[second]
            size = min(size, stop - start)
            low = start if self._rng.random() < 0.5 else stop - size
            kept[low : low + size] = [True] * size
        return kept

    def _split(self, kept: list[bool], runs: list[Run]) -> list[bool] | None:
        """Put back a part of a run and drop as long a stretch elsewhere."""
        long = [run for run in runs if run[1] - run[0] >= 2 * self._step]
        if not long:
            return None
        start, stop = long[self._below(len(long))]
        parts = (stop - start) // self._step
        size = self._step * (1 + self._below(parts - 1))
        low = start + self._below(stop - start - size + 1)
        places = [p for p in range(len(kept) - size + 1) if all(kept[p : p + size])]
        if not places:
            return None
        place = places[self._below(len(places))]
        kept = list(kept)
        kept[low : low + size] = [True] * size
        kept[place : place + size] = [False] * size
        return kept

    def _merge(self, kept: list[bool], runs: list[Run]) -> list[bool] | None:
        """Close the gap between two neighbouring runs by moving one of them to the other."""
        if len(runs) < 2:
            return None
        place = self._below(len(runs) - 1)
        left, right = runs[place], runs[place + 1]
        if self._rng.random() < 0.5:
            return _moved(kept, left, right[0] - (left[1] - left[0]))
        return _moved(kept, right, left[1])

    def _settle(self, mask: Mask, before: Mask) -> Mask:
        """Bring a changed mask on budget without undoing the change, as far as that is possible."""
        space = self._space
        gone = frozenset(difference(before, mask))
        back = frozenset(difference(mask, before))
        if not space.contains(mask):
            return space.repair(mask, self._rng, gone)
        while not space.fits(mask):
            smaller = self._drop(mask, back, compact=self._rng.random() < 0.5)
            if smaller is None:
                break
            mask = smaller
        return space.repair(mask, self._rng, gone)

    def _drop(
        self, mask: Mask, spare: frozenset[int] = frozenset(), compact: bool = False
    ) -> Mask | None:
        """A mask one unit smaller: if possible without `spare`, and, if `compact`, no new gap."""
        pool = [(m, difference(mask, m)) for m in self._space.removals(mask)]
        pool = [p for p in pool if not spare.intersection(p[1])] or pool
        if compact:
            gaps = self._gaps(mask)
            pool = [p for p in pool if self._gaps(p[0]) <= gaps] or pool
        if not pool:
            return None
        return pool[self._choose([_weigh(self._least, unit) for _, unit in pool])][0]

    def _gaps(self, mask: Mask) -> int:
        return len(self._runs([mask.keep[gene[0]] for gene in self._space.genes]))

    def _runs(self, kept: Sequence[bool]) -> list[Run]:
        """Runs of dropped genes, cut where a stack ends and where something protected stays."""
        found: list[Run] = []
        for start, stop in dropped_runs(kept):
            cuts = [g for g in self._starts if start < g < stop]
            found.extend(pairwise([start, *cuts, stop]))
        return found

    def _below(self, bound: int) -> int:
        return int(self._rng.integers(bound))

    def _choose(self, weights: Sequence[float]) -> int:
        return weighted_index(self._rng, weights)


def exchange_neighbours(space: SearchSpace, mask: Mask, keys: Sequence[float]) -> tuple[Mask, ...]:
    """Masks on budget that put back one unit at the end of a gap and drop others for it.

    For a mask still over the budget: masks that cost no more than it does, on budget or over it.
    Ordered by how much the keys of what is dropped grow: with the loss increases of single removals
    as keys, by what each exchange would cost if increases added up.
    """
    value = {i: float(key) for gene, key in zip(space.genes, keys, strict=True) for i in gene}

    def worth(unit: Iterable[int]) -> float:
        return sum(value[i] for i in unit)

    gaps = len(space.gaps(mask))
    most = [(limit, max(limit.cap, limit.cost(mask))) for limit in space.limits]

    def within(other: Mask) -> bool:
        return all(limit.cost(other) <= cost for limit, cost in most)

    found: dict[Mask, float] = {}
    for larger in space.additions(mask):
        back = frozenset(difference(larger, mask))
        if len(space.gaps(larger)) > gaps:
            continue
        for unit in space.removable(larger):
            if back.intersection(unit):
                continue
            smaller = larger.without(unit)
            while not within(smaller):
                further = [u for u in space.removable(smaller) if not back.intersection(u)]
                if not further:
                    break
                smaller = smaller.without(min(further, key=lambda u: (worth(u), u)))
            if within(smaller):
                if space.fits(smaller):
                    smaller = space.fill(smaller, keys)
                change = worth(difference(mask, smaller)) - worth(difference(smaller, mask))
                found.setdefault(smaller, change)
    found.pop(mask, None)
    return tuple(sorted(found, key=lambda m: (found[m], m.key)))


def dropped_runs(kept: Sequence[bool]) -> list[Run]:
    """Maximal runs of False as half-open ranges."""
    return list(Mask(tuple(kept)).runs)


def weighted_index(rng: np.random.Generator, weights: Sequence[float]) -> int:
    """An index drawn in proportion to its weight."""
    total = np.cumsum(weights)
    index = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
    return min(index, len(weights) - 1)


def _moved(kept: list[bool], run: Run, start: int) -> list[bool] | None:
    """The flags with one dropped run moved to a new start within bounds; None if it stays."""
    length = run[1] - run[0]
    start = min(max(start, 0), len(kept) - length)
    if start == run[0]:
        return None
    kept = list(kept)
    kept[run[0] : run[1]] = [True] * length
    kept[start : start + length] = [False] * length
    return kept


def _weigh(weights: dict[int, float], unit: Iterable[int]) -> float:
    values = [weights[i] for i in unit]
    return sum(values) / len(values)


def _puts_back(larger: Mask, mask: Mask, gone: frozenset[int]) -> bool:
    return bool(gone.intersection(difference(larger, mask)))
