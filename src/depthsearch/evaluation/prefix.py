"""Sharing what masks have in common: one depth-first pass over a set of masks.

Masks are the leaves of a trie over the steps of the model (sites, or blocks where only whole blocks
replay exactly). Each shared prefix is computed once, and a dropped site costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from depthsearch.space import Mask

State = TypeVar("State")

Step = tuple[int, ...]


def steps_of(sites: int, width: int) -> tuple[Step, ...]:
    """The sites in groups of `width` neighbours that are run at once (1: site by site)."""
    return tuple(tuple(range(start, start + width)) for start in range(0, sites, width))


class PrefixWalk(Generic[State]):
    """One pass; `executed[site]` counts how often each site was run.

    `advance(step, kept, state)` runs one step with the flags of its sites and returns the next
    state; it is not called where everything of the step is dropped.
    """

    def __init__(
        self, steps: Sequence[Step], advance: Callable[[int, tuple[bool, ...], State], State]
    ) -> None:
        self._steps = steps
        self._advance = advance
        self.executed = [0] * sum(len(step) for step in steps)

    def run(self, masks: Sequence[Mask], first: State, leaf: Callable[[int, State], None]) -> None:
        """Call `leaf(place of the mask in masks, final state)` once for every mask."""
        order = sorted(range(len(masks)), key=lambda place: masks[place].key)
        self._visit(masks, order, 0, first, leaf)

    def _visit(
        self,
        masks: Sequence[Mask],
        places: Sequence[int],
        depth: int,
        state: State,
        leaf: Callable[[int, State], None],
    ) -> None:
        # The common path is walked in a loop so that states nobody returns to are freed.
        while depth < len(self._steps):
            groups: dict[tuple[bool, ...], list[int]] = {}
            step = self._steps[depth]
            for place in places:
                groups.setdefault(tuple(masks[place].keep[i] for i in step), []).append(place)
            if len(groups) > 1:
                for kept, group in groups.items():
                    self._visit(masks, group, depth + 1, self._next(depth, kept, state), leaf)
                return
            (kept,) = groups
            state = self._next(depth, kept, state)
            depth += 1
        for place in places:
            leaf(place, state)

    def _next(self, depth: int, kept: tuple[bool, ...], state: State) -> State:
        if not any(kept):
            return state
        for site, flag in zip(self._steps[depth], kept, strict=True):
            self.executed[site] += flag
        return self._advance(depth, kept, state)


def executed_sites(masks: Sequence[Mask], width: int = 1) -> list[int]:
    """How often each site would be run for these masks with shared prefixes, nothing computed."""
    walk: PrefixWalk[None] = PrefixWalk(steps_of(len(masks[0]), width), lambda *_: None)
    walk.run(masks, None, lambda *_: None)
    return walk.executed
