"""Where a search stands, read from its run directory by anyone who can see that.

Only reads, and takes no lock: the search may run on another machine that shares the directory.
Needs no torch, so it starts at once.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from depthsearch.config import load_config
from depthsearch.errors import ConfigError, RunDirectoryError
from depthsearch.journal import Record, read_journal
from depthsearch.run.arms import arm_runs
from depthsearch.run.course import Course, Step
from depthsearch.run.directory import ARMS, BEST, COMPARE, CONFIG, JOURNAL, WORKERS, understood

WAITING, STARTED, SEARCHING, FINALS, DONE, STALLED, FAILED = PHASES = (
    "waiting",
    "started",
    "searching",
    "finals",
    "done",
    "stalled",
    "failed",
)
"""A run is waiting (an arm whose turn has not come), started (the dense model is recorded),
searching, in its finals, done, stalled (no new record for unusually long), or failed: without a
result in a comparison that is over."""

_WINDOW_STEPS = 20
_GAP = 8.0
"""A step this many times slower than the median step holds a pause, not work."""
_QUIET_S = 300.0
_QUIET_STEPS = 20.0
"""A run is stalled after `_QUIET_S` without a record, or `_QUIET_STEPS` usual steps if longer."""
_IDLE_S = 60.0
"""Between two records that cost nothing lies a pause, not work, if it is longer than this."""
_FRESH_S = 30.0
"""How old workers.json may be to count as a sign of life."""


@dataclass(frozen=True)
class Worker:
    """One worker of a cluster: where it is, what it does, units of work done."""

    id: str
    node: str
    state: str
    units: int
    busy_s: float
    restarts: int


@dataclass(frozen=True)
class Workers:
    """The workers of a run as workers.json told at `time` (Unix seconds)."""

    time: float
    workers: tuple[Worker, ...]
    units_done: int
    units_reissued: int
    units_queued: int
    quarantined: tuple[str, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Workers:
        """Rebuild from workers.json, version 1; raises KeyError, TypeError or ValueError."""
        if data["version"] != 1:
            raise ValueError(f"version {data['version']}, not 1")
        workers = tuple(
            Worker(
                str(w["id"]),
                str(w.get("node", "")),  # known once it is up
                str(w["state"]),
                int(w["units"]),
                float(w["busy_s"]),
                int(w["restarts"]),
            )
            for w in data["workers"]
        )
        return cls(
            float(data["time"]),
            workers,
            int(data["units_done"]),
            int(data["units_reissued"]),
            int(data["units_queued"]),
            tuple(str(key) for key in data["quarantined"]),
        )

    @property
    def states(self) -> dict[str, int]:
        """How many workers are in each state."""
        names = [worker.state for worker in self.workers]
        return {name: names.count(name) for name in dict.fromkeys(names)}


@dataclass(frozen=True)
class RunState:
    """One run at one moment.

    `asks` is the number of asks answered ("generations"), `best_loss` in nats the lowest on budget
    so far, `front_losses` the same at each of several budgets, `finals_loss` that of the chosen
    mask on fresh data. `evaluations_per_s` and
    `cost_tokens_per_s` cover the last steps without pauses; None before the first. `seconds_left`
    is None where no limit is set or no rate known. `quiet_s` is the age of the last record.
    """

    run: str
    phase: str
    method: str | None = None
    seed: int | None = None
    asks: int = 0
    best_loss: float | None = None
    front_losses: Mapping[str, float | None] = field(default_factory=dict)
    finals_loss: float | None = None
    cost_tokens: float = 0.0
    cost_limit_tokens: float | None = None
    evaluations: int = 0
    max_evaluations: int | None = None
    statuses: Mapping[str, int] = field(default_factory=dict)
    evaluations_per_s: float | None = None
    cost_tokens_per_s: float | None = None
    seconds_left: float | None = None
    quiet_s: float | None = None
    reason: str | None = None
    workers: Workers | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more is to come."""
        return self.phase in (DONE, FAILED)

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class CompareState:
    """A comparison at one moment: its runs in the order of the configuration."""

    run: str
    over: bool
    runs: tuple[RunState, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"run": self.run, "over": self.over, "runs": [run.to_json() for run in self.runs]}


def run_state(
    name: str,
    records: Sequence[Record],
    search: Mapping[str, Any],
    now: float,
    *,
    finished: bool = False,
    workers: Workers | None = None,
) -> RunState:
    """What a journal's `records` say at `now` (Unix seconds).

    `search` is the search section of the configuration: method, seed and limits. `finished` says
    whether best.json is there, which a run writes last.
    """
    course = Course()
    for record in records:
        course.feed(record)
    cost_limit, most = search.get("cost_tokens"), search.get("max_evaluations")
    evaluations_per_s, cost_per_s = rates(course.steps)
    quiet = None if course.last_time is None else max(0.0, now - course.last_time)
    alive = workers is not None and now - workers.time < _FRESH_S
    phase = DONE if finished else _phase(course, quiet, most, alive)
    left = None
    if phase in (SEARCHING, FINALS):
        left = min(
            (
                max(0.0, limit - done) / rate
                for limit, done, rate in (
                    (cost_limit, course.cost_tokens, cost_per_s),
                    (most, course.evaluations, evaluations_per_s),
                )
                if limit is not None and rate
            ),
            default=None,
        )
    return RunState(
        run=name,
        phase=phase,
        method=search.get("method"),
        seed=search.get("seed"),
        asks=course.asks,
        best_loss=course.best_loss,
        front_losses=course.front_losses,
        finals_loss=course.finals_loss,
        cost_tokens=course.cost_tokens,
        cost_limit_tokens=cost_limit,
        evaluations=course.evaluations,
        max_evaluations=most,
        statuses=course.statuses,
        evaluations_per_s=evaluations_per_s,
        cost_tokens_per_s=cost_per_s,
        seconds_left=0.0 if phase == DONE else left,
        quiet_s=quiet,
        reason=course.reason,
        workers=workers,
    )


def rates(steps: Sequence[Step]) -> tuple[float | None, float | None]:
    """Evaluations and cost tokens per second over the last steps, None before the first.

    A step that took `_GAP` times longer for its cost than the median holds the time between a
    killed run and its resumption, and is left out.
    """
    recent = [s for s in steps if s.cost_tokens > 0 and s.seconds > 0][-_WINDOW_STEPS:]
    if not recent:
        return None, None
    usual = statistics.median_low([s.seconds / s.cost_tokens for s in recent])
    working = [s for s in recent if s.seconds / s.cost_tokens <= _GAP * usual]
    seconds = sum(s.seconds for s in working)
    return (
        sum(s.evaluations for s in working) / seconds,
        sum(s.cost_tokens for s in working) / seconds,
    )


def working_seconds(records: Sequence[Record]) -> float:
    """How long a run worked, without the time between its being stopped and resumed.

    A step that took `_GAP` times longer for its cost than the median counts as a median one.
    """
    steps: list[tuple[float, float]] = []
    time, cost = (float(records[0]["time"]), 0.0) if records else (0.0, 0.0)
    for record in records[1:]:
        then, spent = float(record["time"]), float(record.get("cost_tokens", cost))
        steps.append((max(0.0, then - time), spent - cost))
        time, cost = then, spent
    paid = [seconds / spent for seconds, spent in steps if spent > 0]
    usual = statistics.median_low(paid) if paid else 0.0
    return sum(
        (seconds if seconds <= _GAP * usual * spent else usual * spent)
        if spent > 0
        else (seconds if seconds <= _IDLE_S else 0.0)
        for seconds, spent in steps
    )


def _phase(course: Course, quiet: float | None, most: int | None, alive: bool) -> str:
    """The phase of a run without best.json; `alive` says that its workers were heard of."""
    if quiet is None:
        return STARTED
    usual = statistics.median([s.seconds for s in course.steps[-_WINDOW_STEPS:]] or [0.0])
    if quiet > max(_QUIET_S, _QUIET_STEPS * usual) and not alive:
        return STALLED
    if course.op in ("stop", "finals", "end"):
        return FINALS
    if course.op == "tell":
        # The next ask follows a tell at once, unless the finals have begun.
        last = most is not None and course.evaluations >= most
        return FINALS if last or quiet > max(2.0, usual) else SEARCHING
    return STARTED if course.op == "start" else SEARCHING


class Watcher:
    """Reads one run or comparison again and again; a journal only when it has changed."""

    def __init__(self, path: Path) -> None:
        """Raises RunDirectoryError where `path` is neither a run directory nor a comparison."""
        self._path = path
        self._read: dict[Path, tuple[tuple[int, int], list[Record]]] = {}
        if not path.is_dir():
            raise RunDirectoryError(f"there is no run directory at {path}")
        config = path / CONFIG
        self._compare = not (path / JOURNAL).is_file()
        if not config.is_file() or (self._compare and _arms(config) is None):
            missing = JOURNAL if config.is_file() else CONFIG
            raise RunDirectoryError(
                f"{path} is not a run directory: it has no {missing}; give the --out of "
                "`depthsearch search` or `depthsearch compare`"
            )

    def look(self, now: float | None = None) -> RunState | CompareState:
        """The state at `now` (Unix seconds), the present by default.

        Raises JournalError for a damaged journal, RunDirectoryError for a run that has vanished or
        holds something else.
        """
        now = time.time() if now is None else now
        if not self._compare:
            return self._run(self._path, self._path.name, now)
        names = _arms(self._path / CONFIG)
        if names is None:
            raise RunDirectoryError(f"{self._path} is no comparison any more")
        runs = [self._run(self._path / ARMS / name, name, now) for name in names]
        over = (self._path / COMPARE).is_file()
        if over:
            runs = [
                run if run.over else replace(run, phase=FAILED, seconds_left=None) for run in runs
            ]
        return CompareState(self._path.name, over, tuple(runs))

    def _run(self, path: Path, name: str, now: float) -> RunState:
        if self._compare and not (path / JOURNAL).is_file():
            return RunState(name, WAITING)
        records = self._records(path / JOURNAL)
        if records and records[0].get("op") != "start":
            raise RunDirectoryError(f"{path / JOURNAL} is not the journal of a search")
        with understood(path / JOURNAL):
            config = records[0]["config"] if records else load_config(path / CONFIG).to_json()
            return run_state(
                name,
                records,
                config["search"],
                now,
                finished=(path / BEST).is_file(),
                workers=_workers(path / WORKERS),
            )

    def _records(self, path: Path) -> list[Record]:
        try:
            found = path.stat()
        except OSError as error:
            raise RunDirectoryError(f"{path} has vanished: {error.strerror}") from error
        key = (found.st_size, found.st_mtime_ns)
        if path not in self._read or self._read[path][0] != key:
            self._read[path] = (key, read_journal(path))
        return self._read[path][1]


def _arms(config: Path) -> list[str] | None:
    """The names of a comparison's runs, None for a file that doesn't describe a comparison."""
    try:
        compare = load_config(config).compare
    except ConfigError:
        return None
    if compare is None:
        return None
    return [run.name for run in arm_runs(compare)]


def _workers(path: Path) -> Workers | None:
    """What workers.json holds, None without one and for one that can't be understood."""
    try:
        return Workers.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
