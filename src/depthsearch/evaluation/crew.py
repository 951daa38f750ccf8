"""What the dispatcher and the workers of a run say to each other, wherever they are.

A `Crew` is told which units to compute and by whom; it answers with events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from depthsearch.space import Mask, Status


@dataclass(frozen=True)
class Unit:
    """Masks to evaluate on one batch of the text named `text`; `number` is never used twice.

    `work` is about how much there is to do, in sublayers executed.
    """

    number: int
    text: str
    batch: int
    masks: tuple[Mask, ...]
    work: int = 0


@dataclass(frozen=True)
class Answer:
    """What a worker found for one mask: losses by sequence, empty after a failure.

    `cost_tokens` is what the mask took where that is only known afterwards.
    """

    losses: tuple[float, ...]
    status: Status
    cost_tokens: float | None = None


@dataclass(frozen=True)
class Joined:
    """A worker has loaded the model and waits for units."""

    worker: str


@dataclass(frozen=True)
class Done:
    """A unit is computed; one answer a mask. `seconds` is what the worker spent on it."""

    worker: str
    number: int
    answers: tuple[Answer, ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class Failed:
    """A unit ended in an error that its worker survived."""

    worker: str
    number: int
    reason: str


@dataclass(frozen=True)
class Lost:
    """A worker is gone, with all that it held."""

    worker: str
    reason: str


Event = Joined | Done | Failed | Lost


class Crew(Protocol):
    """Workers, wherever they are. Names are the dispatcher's; a name never comes back."""

    @property
    def capacity(self) -> int:
        """How many workers there is room for now; it may change while a search runs."""
        ...

    def start(self, worker: str) -> None:
        """Begin to start a worker; `Joined` or `Lost` follows."""
        ...

    def submit(self, worker: str, unit: Unit) -> None:
        """Queue a unit with a worker that has joined; workers compute in order."""
        ...

    def kill(self, worker: str) -> None:
        """End a worker at once; no event needs to follow."""
        ...

    def wait(self, timeout: float) -> Sequence[Event]:
        """What happened, at the latest after `timeout` seconds; may be nothing."""
        ...


@dataclass(frozen=True)
class Limits:
    """When patience ends: seconds for a unit, for a first worker, and restarts of one place.

    `restarts` counts in a row: a finished unit sets it back.
    """

    unit_timeout_s: float = 600.0
    start_timeout_s: float = 600.0
    restarts: int = 3
