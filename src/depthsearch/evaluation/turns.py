"""What a mask does at each step of the model: what it runs, and where a repair is aimed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from depthsearch.space import Mask

Repair = Literal["none", "table", "gap", "sequential"]

Step = tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """One step of one mask: the flags of its sites, and what its output is fitted to.

    `target` t means the dense stream before step t; None leaves the weights as they are.
    """

    kept: tuple[bool, ...]
    target: int | None = None


def steps_of(sites: int, width: int) -> tuple[Step, ...]:
    """The sites in groups of `width` neighbours that are run at once (1: site by site)."""
    return tuple(tuple(range(start, start + width)) for start in range(0, sites, width))


def turns_of(mask: Mask, steps: Sequence[Step], repair: Repair = "none") -> tuple[Turn, ...]:
    """The turns of a mask, one a step.

    `gap` refits what is run last before each gap, or first where the model begins with one, and so
    does `table`, which looks it up; `sequential` refits also everything after the first gap. A step
    that runs only a part of its sites has a gap of its own, which its output mends.
    """
    flags = [tuple(mask.keep[i] for i in step) for step in steps]
    if repair == "none":
        return tuple(Turn(kept) for kept in flags)
    found: list[Turn] = []
    damaged = begun = False
    for place, kept in enumerate(flags):
        if not any(kept):
            damaged = True
            found.append(Turn(kept))
            continue
        after = next((t for t in range(place + 1, len(flags)) if any(flags[t])), len(flags))
        gap = after > place + 1 or not all(kept) or (damaged and not begun)
        damaged, begun = damaged or gap, True
        aimed = gap or (repair == "sequential" and damaged)
        found.append(Turn(kept, after if aimed else None))
    return tuple(found)


def fitted_site(step: Step, turn: Turn) -> int:
    """The site whose projection a turn refits: the last one that it runs."""
    return max(site for site, kept in zip(step, turn.kept, strict=True) if kept)
