"""The knapsack behind the method `additive`: the cheapest removals that free enough, exactly.

Removals stand in a line and each is taken or left. A choice counts only if it is *tight*: none of
it could be put back. That holds by itself where every removal costs something, but a loss can also
fall, and then the plain minimum would drop more than the budget asks for.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_MOST_STATES = 20_000
_MOST_NODES = 500_000
_NONE = -1


@dataclass(frozen=True)
class Removal:
    """One removal: places `[start, stop)` of the line, the cost it frees and the loss it adds.

    A removal of two places is a pair of sites, which free `first` and `second`. Pairs that touch
    make one run, of which any first site can be put back with any second one behind it. A removal
    of one place has no second site.
    """

    start: int
    stop: int
    first: int
    second: int
    increase: float

    @property
    def weight(self) -> int:
        """What it frees in all."""
        return self.first + self.second

    @property
    def paired(self) -> bool:
        """Whether it is a pair of sites."""
        return self.stop - self.start > 1


@dataclass(frozen=True, order=True)
class Choice:
    """The removals taken, by their places in the sequence given, and their summed increase."""

    increase: float
    taken: tuple[int, ...]


def cheapest_choices(
    removals: Sequence[Removal], need: int, count: int = 1, most_states: int = _MOST_STATES
) -> tuple[tuple[Choice, ...], bool]:
    """The `count` tight choices with the smallest sums that free at least `need`, best first.

    Also whether they are proven to be the best. Dynamic programming along the line over the sums
    that can be reached, which are few where sites come in few sizes (at most `need` over the
    greatest common divisor of what they free); beyond `most_states` of them, branch and bound,
    which is for single removals only: with pairs nothing is found then.
    """
    found = _by_states(removals, need, count, most_states)
    if found is not None:
        return found, True
    if any(removal.paired for removal in removals):
        return (), False
    return _by_bounds(removals, need, count)


# What was taken so far, newest first, and its sum.
_Chain = tuple["_Chain | None", int]
_Partial = tuple[float, "_Chain | None"]
# What is freed, the lightest part that could be put back, and the lightest first part of the run.
_State = tuple[int, int, int]


def _by_states(
    removals: Sequence[Removal], need: int, count: int, most_states: int
) -> tuple[Choice, ...] | None:
    """Dynamic programming along the line; None where there are too many states."""
    end = max((removal.stop for removal in removals), default=0)
    starts: list[list[int]] = [[] for _ in range(end + 1)]
    for place, removal in enumerate(removals):
        starts[removal.start].append(place)
    # No more than this can be freed from each place on.
    reach = [0] * (end + 1)
    for place in range(end - 1, -1, -1):
        reach[place] = max(
            [reach[place + 1]]
            + [removals[r].weight + reach[removals[r].stop] for r in starts[place]]
        )
    line: list[dict[_State, list[_Partial]]] = [{} for _ in range(end + 1)]
    line[0][0, _NONE, _NONE] = [(0.0, None)]
    complete: list[Choice] = []
    for place in range(end):
        states, line[place] = line[place], {}
        if len(states) > most_states:
            return None
        for (freed, lightest, first), partials in states.items():
            if freed + reach[place] < need:
                continue
            _merge(line[place + 1], (freed, lightest, _NONE), partials, count)
            for r in starts[place]:
                removal = removals[r]
                run = _least(first, removal.first) if removal.paired else removal.first
                light = _least(lightest, run + removal.second)
                more = freed + removal.weight
                grown = [(loss + removal.increase, (chain, r)) for loss, chain in partials]
                if more < need:
                    state = (more, light, run if removal.paired else _NONE)
                    _merge(line[removal.stop], state, grown, count)
                elif more - need < light:
                    for loss, chain in grown:
                        _keep(complete, Choice(loss, _taken(chain)), count)
    return tuple(complete)


def _by_bounds(
    removals: Sequence[Removal], need: int, count: int
) -> tuple[tuple[Choice, ...], bool]:
    """Depth-first branch and bound, cheapest for its weight first (Horowitz and Sahni, 1974).

    A branch is left when the linear relaxation of what remains is not better than the last of the
    choices kept. The flag is False where the limit on nodes ended it.
    """
    order = sorted(
        (r for r in range(len(removals)) if removals[r].weight > 0),
        key=lambda r: (removals[r].increase / removals[r].weight, r),
    )
    weights = list(accumulate((removals[r].weight for r in order), initial=0))
    losses = list(accumulate((removals[r].increase for r in order), initial=0.0))
    gains = sum(removals[r].increase < 0 for r in order)

    def relaxed(place: int, need: int) -> float:
        """The least that freeing `need` with the removals from `place` on can add."""
        last = bisect_left(weights, weights[place] + need)
        if last <= gains:
            return losses[max(gains, place)] - losses[place]
        share = (weights[place] + need - weights[last - 1]) / (weights[last] - weights[last - 1])
        part = losses[last - 1] + share * (losses[last] - losses[last - 1])
        return part - losses[place]

    complete: list[Choice] = []
    stack: list[tuple[int, int, int, float, _Chain | None]] = [(0, 0, _NONE, 0.0, None)]
    nodes = 0
    while stack:
        nodes += 1
        if nodes > _MOST_NODES:
            return tuple(complete), False
        place, freed, lightest, loss, chain = stack.pop()
        left = need - freed
        if weights[-1] - weights[place] < left:
            continue
        if len(complete) == count and loss + relaxed(place, left) >= complete[-1].increase:
            continue
        removal = removals[order[place]]
        stack.append((place + 1, freed, lightest, loss, chain))
        light, more = _least(lightest, removal.weight), freed + removal.weight
        grown = (chain, order[place])
        if more < need:
            stack.append((place + 1, more, light, loss + removal.increase, grown))
        elif more - need < light:
            _keep(complete, Choice(loss + removal.increase, _taken(grown)), count)
    return tuple(complete), True


def _least(known: int, other: int) -> int:
    return other if known == _NONE else min(known, other)


def _merge(
    states: dict[_State, list[_Partial]], state: _State, partials: Sequence[_Partial], count: int
) -> None:
    known = states.get(state)
    states[state] = (
        list(partials)
        if known is None
        else sorted([*known, *partials], key=lambda partial: partial[0])[:count]
    )


def _keep(complete: list[Choice], choice: Choice, count: int) -> None:
    insort(complete, choice)
    del complete[count:]


def _taken(chain: _Chain | None) -> tuple[int, ...]:
    taken: list[int] = []
    while chain is not None:
        chain, last = chain
        taken.append(last)
    return tuple(sorted(taken))
