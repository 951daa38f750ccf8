"""Spreading units over workers that may die, without changing a single result.

The dispatcher knows no cluster: it hands units to a `Crew`, hears what became of them, and keeps
every worker busy with at most one unit queued. A result belongs to a (batch, mask) pair and does
not depend on the unit it came in, so lost work is simply issued again, in other pieces if need be.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from depthsearch.errors import CONTINUED, ClusterError
from depthsearch.evaluation.choosing import GRAIN, choose, target
from depthsearch.evaluation.crew import (
    Answer,
    Crew,
    Done,
    Event,
    Failed,
    Joined,
    Limits,
    Lost,
    Unit,
)
from depthsearch.evaluation.cutting import Pool, Run, Sheet
from depthsearch.evaluation.progress import Load, Progress
from depthsearch.space import Mask, Status

QUEUED = 2
"""Units a worker holds at most: the one it computes and the next."""

_FAILURES = 2
_DEATHS = 3
"""Failures or deaths in a row that a mask alone is given up after.

A worker may die for another reason: its node was taken away, somebody else's job took the memory.
"""

_IDLE = Load()


@dataclass
class _Worker:
    name: str
    place: int
    ready: bool = False
    held: deque[Unit] = field(default_factory=deque)
    seen: dict[str, set[int]] = field(default_factory=dict)
    since: float = 0.0
    load: Load = _IDLE
    units: int = 0
    busy_s: float = 0.0


@dataclass
class _Place:
    starts: int = 0
    fruitless: int = 0


class Dispatcher:
    """Gets units computed by a crew; one thread, no locks.

    `on_change(state)` hears where things stand, often: see `state`.
    """

    def __init__(
        self,
        crew: Crew,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[Dispatcher], None] | None = None,
    ) -> None:
        self._crew = crew
        self._limits = limits or Limits()
        self._clock = clock
        self._on_change = on_change or (lambda _: None)
        self._places: list[_Place] = []
        self._workers: dict[str, _Worker] = {}
        self._pool = Pool()
        self._hungry: tuple[dict[str, None], dict[str, None]] = ({}, {})
        self._found: dict[tuple[int, str], Answer] = {}
        self._text = ""
        self._masks: dict[str, Mask] = {}
        self._open: set[int] = set()
        self._batch = 0
        self._waited: set[str] = set()
        self._tried: dict[int, frozenset[str]] = {}
        self._alone: dict[tuple[str, Mask], list[str]] = {}
        self._sure = True
        self._least = 1
        self._quarantined: dict[tuple[str, Mask], tuple[Status, str]] = {}
        self._given_up: dict[Mask, None] = {}
        self._next_look = clock()
        self._numbers = 0
        self._done = 0
        # Half of the time after which a worker is taken for hung.
        self._progress = Progress(self._limits.unit_timeout_s / 2)
        self._fruit = 0
        self._seers: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self._refused: set[str] = set()
        self._reissued = 0
        self._last_reason = ""
        self._waiting_since = clock()

    @property
    def ready(self) -> int:
        """Workers that take units now."""
        return sum(worker.ready for worker in self._workers.values())

    @property
    def places(self) -> int:
        """Workers there is room for, whether they are up or not."""
        return len(self._places)

    @property
    def quarantined(self) -> dict[Mask, str]:
        """Masks given up on any text because whoever tried them failed, with the last reason."""
        return {mask: reason for (_, mask), (_, reason) in self._quarantined.items()}

    def state(self) -> dict[str, Any]:
        """Workers and counts since the last `recount`, as plain data for JSON."""
        return {
            "workers": [
                {
                    "id": worker.name,
                    "state": "starting" if not worker.ready else "busy" if worker.held else "ready",
                    "units": worker.units,
                    "busy_s": round(worker.busy_s, 3),
                    "restarts": self._places[worker.place].starts - 1,
                }
                for worker in self._workers.values()
            ],
            "units_done": self._done,
            "units_reissued": self._reissued,
            "units_queued": len(self._pool),
            "quarantined": [mask.key for mask in self._given_up],
        }

    def recount(self) -> None:
        """Begin the counts of `state` anew: another run goes on with the same workers."""
        self._done = self._reissued = 0
        self._given_up.clear()
        for worker in self._workers.values():
            worker.units, worker.busy_s = 0, 0.0

    def start(self) -> None:
        """Start as many workers as there is room for, without waiting for them."""
        room = self._crew.capacity
        while len(self._places) < room:
            self._places.append(_Place())
        for place, entry in enumerate(self._places[:room]):
            if entry.starts == 0:
                self._start(place)

    def compute(
        self,
        text: str,
        batch: int,
        masks: Sequence[Mask],
        ahead: Sequence[int] = (),
        *,
        sure: bool,
        least: int = 1,
    ) -> list[Answer]:
        """The answers for `masks` on one batch, in their order.

        `ahead` are the batches that come next. Where they are `sure` to be wanted for all these
        masks, work is spread over batches first; where a race may end some, the masks of this batch
        are split and later batches only fill idle workers. Units have `least` masks or more while
        so many are left. Raises ClusterError when no worker is left.
        """
        self._least = least
        self._want(text, batch, masks, ahead, sure)
        self._waiting_since = self._next_look = self._clock()
        while self._waited:
            self._assign()
            for event in self._crew.wait(self._patience):
                self._handle(event)
            if self._clock() >= self._next_look:
                self._look_around()
            self._on_change(self)
        self._open.discard(batch)
        found = {key: self._found.pop((batch, key)) for key in self._masks}
        return [found[mask.key] for mask in masks]

    def _want(
        self, text: str, batch: int, masks: Sequence[Mask], ahead: Sequence[int], sure: bool
    ) -> None:
        """Queue what is asked for; what was begun for the same masks before goes on."""
        wanted = {mask.key: mask for mask in masks}
        same = text == self._text and sure == self._sure and wanted.keys() == self._masks.keys()
        self._sure, self._batch = sure, batch
        if not (same and sure):
            self._refused.clear()
        if not (same and batch in self._open and self._open.issuperset(ahead)):
            out = self._outstanding() if text == self._text else set()
            kept = self._found if text == self._text else {}
            self._text, self._masks, self._open = text, wanted, {batch, *ahead}
            self._found = {
                (b, key): answer
                for (b, key), answer in kept.items()
                if b in self._open and key in wanted
            }
            self._pool.clear()
            sheet = Sheet(wanted.values())
            for b in (batch, *ahead):
                missing = self._missing(b, sheet.masks, out)
                if len(missing) == len(sheet.masks):
                    self._pool.add(Run(b, sheet, 0, len(missing)))
                elif missing:
                    self._pool.add(Run.of(b, missing))
        self._waited = {key for key in wanted if (batch, key) not in self._found}

    def _missing(
        self, batch: int, order: Sequence[Mask], out: set[tuple[int, str]]
    ) -> tuple[Mask, ...]:
        """What is neither known nor being computed; for what is given up, the answer is ready."""
        missing = []
        for mask in order:
            if self._quarantined and (self._text, mask) in self._quarantined:
                self._found[batch, mask.key] = Answer((), self._quarantined[self._text, mask][0])
            elif (batch, mask.key) not in self._found and (batch, mask.key) not in out:
                missing.append(mask)
        return tuple(missing)

    def _outstanding(self) -> set[tuple[int, str]]:
        """What workers hold now of the current text."""
        return {
            (unit.batch, mask.key)
            for worker in self._workers.values()
            for unit in worker.held
            if unit.text == self._text
            for mask in unit.masks
        }

    def _settle(self, unit: Unit, mask: Mask, answer: Answer) -> None:
        """Keep an answer if somebody waits, or will wait, for it."""
        if unit.text == self._text and unit.batch in self._open and mask.key in self._masks:
            self._found[unit.batch, mask.key] = answer
            if unit.batch == self._batch:
                self._waited.discard(mask.key)

    def _assign(self) -> None:
        """Give the idle a unit, then everybody a second one while whole batches are handed out.

        From there on a queued unit could wait behind a slow one while another worker idles.
        """
        if not self._progress.busy:
            self._refused.clear()
        for depth, hungry in enumerate(self._hungry):
            for name in list(hungry):
                if not self._pool:
                    return
                if name in self._refused:
                    continue
                worker = self._workers[name]
                run = self._choose(worker, depth)
                if run is not None:
                    size = min(target(self._share(run.batch), run), self._progress.longest)
                    self._submit(worker, self._pool.take(run, size, self._least))
                elif depth:
                    return
                else:
                    self._refused.add(name)

    def _choose(self, worker: _Worker, depth: int) -> Run | None:
        """What to give a worker that holds `depth` units; None where others should try."""
        second: float | None = None
        if depth:
            share = self._share(self._batch)
            if share <= worker.load.work:
                return None
            second = share / GRAIN - worker.load.work
        return choose(
            self._pool,
            None if self._sure else self._batch,
            worker.seen.get(self._text, ()),
            self._seers[self._text] if self._progress.busy else {},
            allowed=lambda run: worker.name not in run.tried or self._all_tried(run.tried),
            second=second,
        )

    def _all_tried(self, tried: Collection[str]) -> bool:
        """Whether every worker that is up is among them; one still starting may never be."""
        return all(name in tried for name, worker in self._workers.items() if worker.ready)

    def _share(self, batch: int) -> float:
        """What is queued and being computed, less what a race may still end, over the workers."""
        workers = len(self._workers)
        if workers <= 1:
            return math.inf
        left = self._pool.cost
        if not self._sure and batch == self._batch:
            left = self._pool.cost_of(batch)
        return (left + self._progress.left(self._clock())) / workers

    def _submit(self, worker: _Worker, run: Run) -> None:
        self._numbers += 1
        unit = Unit(self._numbers, self._text, run.batch, run.masks, run.cost)
        if run.tried:
            self._tried[unit.number] = run.tried
        if not worker.held:
            worker.since = self._clock()
        worker.held.append(unit)
        seen = worker.seen.setdefault(unit.text, set())
        if unit.batch not in seen:
            seen.add(unit.batch)
            self._seers[unit.text][unit.batch] += 1
        self._place(worker)
        self._crew.submit(worker.name, unit)

    def _place(self, worker: _Worker) -> None:
        """Enter a worker where it belongs by what it holds."""
        work = sum([unit.work for unit in worker.held])
        load = Load(1, work, worker.since) if worker.held else _IDLE
        self._progress.change(worker.load, load)
        worker.load = load
        for depth, hungry in enumerate(self._hungry):
            if worker.ready and len(worker.held) == depth:
                hungry[worker.name] = None
            else:
                hungry.pop(worker.name, None)

    @property
    def _patience(self) -> float:
        """Seconds between two looks at who is overdue and who may join."""
        return min(1.0, self._limits.unit_timeout_s / 10)

    def _look_around(self) -> None:
        self._next_look = self._clock() + self._patience
        self._end_overdue()
        self.start()
        self._check_alive()

    def _handle(self, event: Event) -> None:
        worker = self._workers.get(event.worker)
        if worker is None:
            return
        if isinstance(event, Joined):
            worker.ready = True
            self._refused.clear()
            self._place(worker)
        elif isinstance(event, Lost):
            self._lose(worker, event.reason, Status.FAILED, _DEATHS)
        else:
            self._finish(worker, event)

    def _finish(self, worker: _Worker, event: Done | Failed) -> None:
        unit = next((unit for unit in worker.held if unit.number == event.number), None)
        if unit is None:
            return
        worker.held.remove(unit)
        worker.since = self._clock()
        self._place(worker)
        if isinstance(event, Failed):
            self._suspect(unit, worker.name, event.reason, Status.FAILED, _FAILURES)
            return
        self._places[worker.place].fruitless = 0
        worker.units += 1
        worker.busy_s += event.seconds
        self._done += 1
        self._progress.finished(unit.work, event.seconds)
        self._tried.pop(unit.number, None)
        for mask, answer in zip(unit.masks, event.answers, strict=True):
            self._alone.pop((unit.text, mask), None)
            self._settle(unit, mask, answer)

    def _lose(self, worker: _Worker, reason: str, status: Status, tries: int) -> None:
        """Bury a worker: the unit it computed is suspect, the one queued behind is not."""
        del self._workers[worker.name]
        self._progress.change(worker.load, _IDLE)
        for text, seen in worker.seen.items():
            self._seers[text].subtract(seen)
        self._refused.clear()
        for hungry in self._hungry:
            hungry.pop(worker.name, None)
        self._last_reason = reason
        place = self._places[worker.place]
        # A worker that is not done with many masks in time may be well, and the unit too large.
        late = status is Status.TIMED_OUT and len(worker.held[0].masks) > 1
        place.fruitless += not late
        for position, unit in enumerate(worker.held):
            if position == 0:
                self._suspect(unit, worker.name, reason, status, tries)
            else:
                self._reissue(unit, unit.masks, self._tried.pop(unit.number, frozenset()))
        if place.fruitless <= self._limits.restarts:
            self._start(worker.place)

    def _start(self, place: int) -> None:
        entry = self._places[place]
        name = f"w{place}" if entry.starts == 0 else f"w{place}.{entry.starts}"
        entry.starts += 1
        self._workers[name] = _Worker(name, place)
        self._crew.start(name)

    def _suspect(self, unit: Unit, worker: str, reason: str, status: Status, tries: int) -> None:
        """Try a unit again whole, then in halves; a mask alone is given up after so many tries.

        In halves at once where the time ran out: it may have been too short for so many masks. Two
        workers at least have failed it then, where there is another.
        """
        tried = self._tried.pop(unit.number, frozenset())
        if len(unit.masks) == 1:
            mask = unit.masks[0]
            alone = self._alone.setdefault((unit.text, mask), [])
            alone.append(worker)
            if len(alone) >= tries and (len(set(alone)) > 1 or self._all_tried(alone)):
                self._quarantine(unit.text, mask, status, reason)
                return
        half = len(unit.masks) // 2
        if status is Status.TIMED_OUT and half:
            # Nobody's fault, perhaps; and what is larger than its halves need not be tried.
            self._progress.late(unit.work)
            for masks in (unit.masks[:half], unit.masks[half:]):
                self._reissue(unit, masks, ())
            return
        half = half if tried else 0
        for masks in (unit.masks[:half], unit.masks[half:]):
            # Who had a mask in company may still have it alone.
            single = len(masks) == 1
            found = self._alone.get((unit.text, masks[0]), []) if single else tried | {worker}
            self._reissue(unit, masks, found)

    def _quarantine(self, text: str, mask: Mask, status: Status, reason: str) -> None:
        """Answer for a mask nobody could evaluate on a text, and take it out of what is queued.

        On another text, which may ask less of a worker, it is tried anew.
        """
        self._quarantined[text, mask] = (status, reason)
        self._given_up[mask] = None
        if text == self._text:
            if mask.key in self._masks:
                for batch in self._open:
                    self._found.setdefault((batch, mask.key), Answer((), status))
                self._waited.discard(mask.key)
            self._pool.discard(mask)
        if status is not Status.TIMED_OUT or self._progress.units > self._fruit:
            # The mask was at fault; not if no worker gets anything done, mask after mask.
            for place in self._places:
                place.fruitless = 0
        self._fruit = self._progress.units

    def _reissue(self, unit: Unit, masks: Sequence[Mask], tried: Iterable[str]) -> None:
        """Queue masks of a unit again, at the end, so that what is innocent is done before.

        What nobody waits for any more is not.
        """
        wanted = tuple(
            mask
            for mask in masks
            if mask.key in self._masks and (unit.text, mask) not in self._quarantined
        )
        if not wanted or unit.text != self._text or unit.batch not in self._open:
            return
        self._reissued += 1
        self._pool.add(Run.of(unit.batch, wanted, tried))
        self._refused.clear()

    def _end_overdue(self) -> None:
        now = self._clock()
        for worker in list(self._workers.values()):
            if worker.held and now - worker.since >= self._limits.unit_timeout_s:
                self._crew.kill(worker.name)
                reason = f"no answer in {self._limits.unit_timeout_s:g} s"
                self._lose(worker, reason, Status.TIMED_OUT, _FAILURES)

    def _check_alive(self) -> None:
        if self.ready:
            self._waiting_since = self._clock()
            return
        if not self._workers and self._places:
            raise ClusterError(
                f"all workers failed, each {self._limits.restarts + 1} times in a row "
                f"({self._last_reason}); nothing is lost: mend the cause; {CONTINUED}"
            )
        if self._clock() - self._waiting_since > self._limits.start_timeout_s:
            raise ClusterError(
                f"no worker came up in {self._limits.start_timeout_s:g} s"
                f"{f' ({self._last_reason})' if self._last_reason else ''}: does the cluster have "
                "what cluster.num_cpus, num_gpus and resources ask for? nothing is lost: "
                f"{CONTINUED}"
            )
