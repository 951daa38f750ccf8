"""Simulated workers: the dispatcher for real, the work and the clock made up.

Answers how many workers a search can feed, and lets tests kill workers at chosen moments.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from depthsearch.evaluation.crew import Answer, Done, Event, Failed, Joined, Lost, Unit
from depthsearch.space import Mask

Seconds = Callable[[Unit, np.random.Generator], float]
Evaluate = Callable[[str, int, Mask], Answer]
Fate = Callable[[str, Unit, np.random.Generator], str]


class SimulatedCrew:
    """A `Crew` of `workers` that compute in simulated time.

    `seconds(unit, rng)` is how long a unit takes, `evaluate(text, batch, mask)` what comes out, and
    `fate(worker, unit, rng)` what becomes of it: "done", "failed", "lost" or "hung". `now` is the
    simulated clock; `busy_s` sums the time workers spent on units that were done. The first unit on
    a batch takes a worker `record_s` more, and `recorded` counts how often that was.
    """

    def __init__(
        self,
        workers: int,
        evaluate: Evaluate,
        seconds: Seconds = lambda unit, rng: 1.0,
        fate: Fate = lambda worker, unit, rng: "done",
        seed: int = 0,
        start_s: float = 0.0,
        record_s: float = 0.0,
    ) -> None:
        self.capacity = workers
        self.now = 0.0
        self.busy_s = 0.0
        self.units = 0
        self._evaluate = evaluate
        self._seconds = seconds
        self._fate = fate
        self._start_s = start_s
        self._record_s = record_s
        self._seen: set[tuple[str, str, int]] = set()
        self._rng = np.random.default_rng(seed)
        self._events: list[tuple[float, int, Event]] = []
        self._held: dict[str, deque[Unit]] = {}
        self._count = 0

    def clock(self) -> float:
        """Simulated seconds since the start."""
        return self.now

    @property
    def recorded(self) -> int:
        """How often a worker met a batch for the first time."""
        return len(self._seen)

    def start(self, worker: str) -> None:
        """A worker that joins after `start_s`."""
        self._held[worker] = deque()
        self._later(self._start_s, Joined(worker))

    def submit(self, worker: str, unit: Unit) -> None:
        """Queue a unit."""
        self._held[worker].append(unit)
        if len(self._held[worker]) == 1:
            self._begin(worker)

    def kill(self, worker: str) -> None:
        """Take a worker out without a word."""
        self._held.pop(worker, None)

    def wait(self, timeout: float) -> Sequence[Event]:
        """The next event, or none within `timeout` seconds of simulated time."""
        until = self.now + timeout
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            if event.worker in self._held:
                self._settle(event)
                return (event,)
        self.now = until
        return ()

    def _settle(self, event: Event) -> None:
        if isinstance(event, Lost):
            del self._held[event.worker]
        elif isinstance(event, Done | Failed):
            if isinstance(event, Done):
                self.busy_s += event.seconds
                self.units += 1
            held = self._held[event.worker]
            held.popleft()
            if held:
                self._begin(event.worker)

    def _begin(self, worker: str) -> None:
        unit = self._held[worker][0]
        seconds = self._seconds(unit, self._rng)
        seen = (worker, unit.text, unit.batch)
        if seen not in self._seen:
            self._seen.add(seen)
            seconds += self._record_s
        fate = self._fate(worker, unit, self._rng)
        if fate == "hung":
            return
        event: Event = Lost(worker, "killed")
        if fate == "failed":
            event = Failed(worker, unit.number, "refused")
        elif fate == "done":
            found = tuple(self._evaluate(unit.text, unit.batch, mask) for mask in unit.masks)
            event = Done(worker, unit.number, found, seconds)
        self._later(seconds, event)

    def _later(self, seconds: float, event: Event) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, event))
