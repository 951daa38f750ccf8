"""How far workers are with what they hold, from what was asked of them and the clock.

Kept as sums, so that asking costs the same for one worker and for thousands.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Load(NamedTuple):
    """What a worker holds: `work` of its units, in sublayers, the first begun at `since`."""

    busy: int = 0
    work: int = 0
    since: float = 0.0


class Progress:
    """The loads of all workers, and how much work they do in a second.

    No unit should take longer than `most_s` seconds.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._most = math.inf
        self.busy = 0
        self.units = 0
        self._work = 0
        self._since = 0.0
        self._done_work = 0
        self._done_s = 0.0

    def change(self, old: Load, new: Load) -> None:
        """A worker holds something else than before; an empty load is a worker with nothing."""
        self.busy += new.busy - old.busy
        self._work += new.work - old.work
        self._since += new.since - old.since

    def finished(self, work: int, seconds: float) -> None:
        """A unit was computed in so many seconds."""
        self.units += 1
        self._done_work += work
        self._done_s += seconds
        if seconds > 0:
            self._most = max(self._most, work * self._most_s / seconds)

    def late(self, work: int) -> None:
        """A unit was not computed in the time that there was."""
        self._most = min(self._most, work / 2)

    @property
    def longest(self) -> float:
        """The most work that a unit should be, in sublayers.

        That is what a worker does in `most_s`, and at most half of what one did not get done.
        """
        return min(self._pace * self._most_s or math.inf, self._most)

    def left(self, now: float) -> float:
        """About how much of what workers hold is still to do, in sublayers."""
        return max(0.0, self._work - self._pace * (self.busy * now - self._since))

    @property
    def _pace(self) -> float:
        """The work that a worker does in a second, in sublayers; 0 while that is not known."""
        return self._done_work / self._done_s if self._done_s > 0 else 0.0
