"""What a mask does at each step of the model: what it runs, and where a repair is aimed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from depthsearch.space import Mask

Repair = Literal["none", "table", "gap", "sequential"]

Step = tuple[int, ...]


class Steps(tuple[Step, ...]):
    """The steps of a model; `ends` holds for each of its stacks the first step behind it."""

    ends: tuple[int, ...]

    def __new__(cls, steps: Iterable[Step], ends: Sequence[int] = ()) -> Self:
        """Steps of one stack where no `ends` are given."""
        made = super().__new__(cls, steps)
        made.ends = tuple(ends) or (len(made),)
        return made


@dataclass(frozen=True)
class Turn:
    """One step of one mask: the flags of its sites, and what its output is fitted to.

    `target` t means the dense stream before step t; None leaves the weights as they are. `given` is
    the step whose dense stream it is given in a repair that is looked up: None for its own.
    """

    kept: tuple[bool, ...]
    target: int | None = None
    given: int | None = None


def steps_of(sites: int, width: int, ends: Sequence[int] = ()) -> Steps:
    """The sites in groups of `width` neighbours that are run at once (1: site by site).

    `ends` holds for each stack the first site behind it, nothing where there is one stack.
    """
    steps = (tuple(range(start, start + width)) for start in range(0, sites, width))
    return Steps(steps, [end // width for end in ends])


def turns_of(mask: Mask, steps: Steps, repair: Repair = "none") -> tuple[Turn, ...]:
    """The turns of a mask, one a step.

    `gap` refits what is run last before each gap, or first where a stack begins with one, and so
    does `table`, which looks it up; `sequential` refits also everything after the first gap. A step
    that runs only a part of its sites has a gap of its own, which its output mends. No gap reaches
    from one stack into the next, which has a stream of its own.
    """
    flags = [tuple(mask.keep[i] for i in step) for step in steps]
    if repair == "none":
        return tuple(Turn(kept) for kept in flags)
    found: list[Turn] = []
    start, behind = 0, False
    for end in steps.ends:
        damaged = begun = False
        for place in range(start, end):
            kept = flags[place]
            if not any(kept):
                damaged = True
                found.append(Turn(kept))
                continue
            after = next((t for t in range(place + 1, end) if any(flags[t])), end)
            gap = after > place + 1 or not all(kept) or (damaged and not begun)
            damaged, begun = damaged or gap, True
            aimed = gap or (repair == "sequential" and (damaged or behind))
            first = (
                aimed
                and repair == "table"
                and place > start
                and not any(map(any, flags[start:place]))
            )
            found.append(Turn(kept, after if aimed else None, start if first else None))
        start, behind = end, behind or damaged
    return tuple(found)


def fitted_site(step: Step, turn: Turn) -> int:
    """The site whose projection a turn refits: the last one that it runs."""
    return max(site for site, kept in zip(step, turn.kept, strict=True) if kept)
