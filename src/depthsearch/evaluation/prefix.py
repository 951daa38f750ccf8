"""Sharing what masks have in common: one depth-first pass over a set of masks.

Masks are the leaves of a trie over the steps of the model (sites, or blocks where only whole blocks
replay exactly). Each shared prefix is computed once, and a dropped site costs nothing. Masks that
are repaired share a prefix as long as they also aim their refitted projections alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from depthsearch.evaluation.turns import Repair, Steps, Turn, steps_of, turns_of
from depthsearch.space import Mask

State = TypeVar("State")


class PrefixWalk(Generic[State]):
    """One pass; `executed[site]` counts how often each site was run.

    `advance(step, turn, state)` runs one step and returns the next state; it is not called where
    everything of the step is dropped. `prepare(step, turns, state)` hears before that of all turns
    which masks take from here.
    """

    def __init__(
        self,
        steps: Steps,
        advance: Callable[[int, Turn, State], State],
        repair: Repair = "none",
        prepare: Callable[[int, Sequence[Turn], State], None] | None = None,
    ) -> None:
        self._steps = steps
        self._advance = advance
        self._prepare = prepare
        self._repair: Repair = repair
        self.executed = [0] * sum(len(step) for step in steps)

    def run(self, masks: Sequence[Mask], first: State, leaf: Callable[[int, State], None]) -> None:
        """Call `leaf(place of the mask in masks, final state)` once for every mask."""
        order = sorted(range(len(masks)), key=lambda place: masks[place].key)
        turns = [turns_of(mask, self._steps, self._repair) for mask in masks]
        self._visit(turns, order, 0, first, leaf)

    def _visit(
        self,
        turns: Sequence[tuple[Turn, ...]],
        places: Sequence[int],
        depth: int,
        state: State,
        leaf: Callable[[int, State], None],
    ) -> None:
        # The common path is walked in a loop so that states nobody returns to are freed.
        while depth < len(self._steps):
            groups: dict[Turn, list[int]] = {}
            for place in places:
                groups.setdefault(turns[place][depth], []).append(place)
            if self._prepare is not None:
                self._prepare(depth, tuple(groups), state)
            if len(groups) > 1:
                for turn, group in groups.items():
                    self._visit(turns, group, depth + 1, self._next(depth, turn, state), leaf)
                return
            (turn,) = groups
            state = self._next(depth, turn, state)
            depth += 1
        for place in places:
            leaf(place, state)

    def _next(self, depth: int, turn: Turn, state: State) -> State:
        if not any(turn.kept):
            return state
        for site, flag in zip(self._steps[depth], turn.kept, strict=True):
            self.executed[site] += flag
        return self._advance(depth, turn, state)


def executed_sites(
    masks: Sequence[Mask], width: int = 1, repair: Repair = "none", ends: Sequence[int] = ()
) -> list[int]:
    """How often each site would be run for these masks with shared prefixes, nothing computed.

    `ends` as in `steps_of`.
    """
    steps = steps_of(len(masks[0]), width, ends)
    walk: PrefixWalk[None] = PrefixWalk(steps, lambda *_: None, repair)
    walk.run(masks, None, lambda *_: None)
    return walk.executed
