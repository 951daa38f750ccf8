"""The Ray backend: one actor a worker, any of which may die.

Actors are never restarted and tasks never retried by Ray: the dispatcher starts a new actor for a
lost one and issues its units again, so that a mask that kills its worker is found and given up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError

from depthsearch.errors import ClusterError
from depthsearch.evaluation.backend import UnitResult
from depthsearch.evaluation.crew import Answer, Done, Event, Failed, Joined, Limits, Lost, Unit
from depthsearch.evaluation.dispatch import Dispatcher
from depthsearch.evaluation.inprocess import InProcess
from depthsearch.evaluation.lifeline import Lifeline
from depthsearch.evaluation.planned import Planned
from depthsearch.evaluation.refitted import Refitted
from depthsearch.evaluation.worker import Computed, ModelSource, Text, Worker
from depthsearch.evaluation.written import Written
from depthsearch.model.packing import PackedModel
from depthsearch.sources import one_line
from depthsearch.space import Mask, Status

_STATE_EVERY_S = 2.0
_CAPACITY_EVERY_S = 5.0
_CONTROL_GRACE_S = 40.0
_CONNECT_TRIES = 3
_ROUNDING = 1e-6

OnState = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class RaySettings:
    """What a worker takes of the cluster, and how many there are.

    `address` None starts a cluster on this machine, "auto" joins the one that is there.
    `workers` None is as many as there is room for, now and later.
    """

    address: str | None = None
    workers: int | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)


class RayCrew:
    """The workers of one run as Ray actors: a `Crew`."""

    def __init__(
        self,
        settings: RaySettings,
        source: ModelSource,
        packed: PackedModel | None = None,
        worker: type[Worker] = Worker,
    ) -> None:
        self._ours = _connect(settings)
        self._lifeline = _lifeline(ours=self._ours and settings.address is None)
        self._workers = settings.workers
        self.settings = settings
        self._source = source
        self._actor: Any = ray.remote(
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            resources=dict(settings.resources),
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(source.threads)}},
        )(worker)
        self._texts: dict[str, Any] = {}
        self._actors: dict[str, Any] = {}
        self._tasks: dict[Any, tuple[str, int | None]] = {}
        self._gone: list[Event] = []
        self._room = (0.0, 0)
        self.about: dict[str, dict[str, Any]] = {}
        self._packed: Any = None
        if packed is not None:
            try:
                self._packed = self._put(packed)
            except ClusterError:
                self.close()
                raise

    def add_text(self, text: Text) -> None:
        """Make a text known, so that units may name it."""
        if text.name not in self._texts:
            self._texts[text.name] = self._put(text)

    @property
    def capacity(self) -> int:
        """The configured number of workers, or what the cluster has room for."""
        settings = self.settings
        if self._workers is not None:
            return self._workers
        asked, room = self._room
        stale = time.monotonic() - asked > _CAPACITY_EVERY_S or room == 0
        self._lifeline.check(now=stale)
        if stale and self._lifeline.heard:
            there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            need = {"CPU": settings.num_cpus, "GPU": settings.num_gpus, **settings.resources}
            room = int(min(there.get(kind, 0) / n + _ROUNDING for kind, n in need.items() if n > 0))
            self._room = (time.monotonic(), room)
        return room

    def grow(self, workers: int) -> None:
        """Make room for more workers than there were so far."""
        self._workers = max(workers, self._workers or 0)

    def start(self, worker: str) -> None:
        """Create an actor; it loads the model and then reports where it runs."""
        actor = self._actor.remote(self._source, self._packed)
        self._actors[worker] = actor
        self._tasks[actor.about.remote()] = (worker, None)

    def submit(self, worker: str, unit: Unit) -> None:
        """Queue a unit with an actor."""
        keys = [mask.key for mask in unit.masks]
        task = self._actors[worker].run.remote(self._texts[unit.text], unit.batch, keys)
        self._tasks[task] = (worker, unit.number)

    def kill(self, worker: str) -> None:
        """End an actor and forget what it was asked."""
        actor = self._actors.pop(worker, None)
        self._tasks = {task: what for task, what in self._tasks.items() if what[0] != worker}
        self.about.pop(worker, None)
        if actor is not None:
            ray.kill(actor)

    def wait(self, timeout: float) -> Sequence[Event]:
        """Collect what has ended; raises ClusterError where Ray itself is gone."""
        self._lifeline.check()
        if not self._tasks:
            time.sleep(min(timeout, 0.2))
            return ()
        tasks = list(self._tasks)
        if not ray.wait(tasks, num_returns=1, timeout=timeout)[0]:
            return ()
        events: list[Event] = []
        for task in ray.wait(tasks, num_returns=len(tasks), timeout=0)[0]:
            if task in self._tasks:
                events.append(self._event(task))
        return events

    def close(self) -> None:
        """End all workers, and the cluster where it was started for them."""
        for worker in list(self._actors):
            self.kill(worker)
        if self._ours:
            ray.shutdown()

    def _put(self, value: object) -> Any:
        self._lifeline.check(now=True)
        try:
            return ray.put(value)
        except (ObjectStoreFullError, OutOfDiskError) as error:
            raise ClusterError(
                "Ray's object store has no room for the model and the text, nor has the disk that "
                "it falls back to: start the cluster with a larger object_store_memory, or set "
                "cluster.weights=path"
            ) from error

    def _event(self, task: Any) -> Event:
        worker, number = self._tasks.pop(task)
        try:
            found: Any = ray.get(task)
        except RayError as error:
            self.kill(worker)
            return Lost(worker, _reason(error))
        if number is None:
            self.about[worker] = found
            return Joined(worker)
        computed: Computed = found
        if computed.error is None:
            statuses = map(Status, computed.statuses)
            costs = computed.costs or repeat(None)
            answers = tuple(map(Answer, computed.losses, statuses, costs))
            return Done(worker, number, answers, computed.seconds)
        if computed.fatal:
            self.kill(worker)
            return Lost(worker, computed.error)
        return Failed(worker, number, computed.error)


class Cluster:
    """The crew and the dispatcher of one session; a context manager.

    Who is named by `tell_to` hears every two seconds where things stand; no result depends on it.
    """

    def __init__(self, crew: RayCrew) -> None:
        self.crew = crew
        self.dispatcher = Dispatcher(crew, crew.settings.limits, on_change=self._tell)
        self._on_state: OnState | None = None
        self._told = 0.0
        self.dispatcher.start()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def tell_to(self, on_state: OnState) -> None:
        """Tell the state of this run from now on, its counts from nought."""
        self.dispatcher.recount()
        self._on_state, self._told = on_state, 0.0

    def close(self) -> None:
        """End the workers, and the cluster where this run joined or started it."""
        self.crew.close()

    def _tell(self, dispatcher: Dispatcher) -> None:
        now = time.monotonic()
        if self._on_state is None or now - self._told < _STATE_EVERY_S:
            return
        self._told = now
        state = dispatcher.state()
        for worker in state["workers"]:
            worker.update(self.crew.about.get(worker["id"], {}))
        self._on_state({"version": 1, "time": time.time(), **state})


class RayBackend(Planned[InProcess | Refitted | Written]):
    """Evaluates masks on one text by the workers of a cluster: a `Backend`.

    `planner` is the same text in-process, which says what things cost and computes the hints; it
    runs no unit.
    """

    def __init__(
        self, cluster: Cluster, planner: InProcess | Refitted | Written, text: Text
    ) -> None:
        super().__init__(planner)
        self._cluster = cluster
        self._text = text
        cluster.crew.add_text(text)

    def run(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int] = (), *, sure: bool = True
    ) -> UnitResult:
        """Have one unit computed, in pieces, and the next ones begun.

        The cost is that of the whole set on one worker, so that it does not depend on how many
        there are; of texts written, what each worker counted.
        """
        answers = self._cluster.dispatcher.compute(self._text.name, batch, masks, ahead, sure=sure)
        if isinstance(self._planner, Written):
            cost = sum(answer.cost_tokens or 0.0 for answer in answers)
        else:
            cost = self._planner.unit_cost(batch, masks)
        return UnitResult(
            tuple(answer.losses for answer in answers),
            tuple(answer.status for answer in answers),
            cost,
        )


def _connect(settings: RaySettings) -> bool:
    """Join the cluster, or start one that listens on this machine only.

    False where this process has joined one already; True makes leaving it our duty.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if settings.address is not None:
        options["address"] = settings.address
    else:
        # Without an address Ray would join RAY_ADDRESS, or what else runs on this machine.
        options |= {
            "address": "local",
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
        if settings.workers is not None:
            # Ray counts cores; workers that share them are the user's decision.
            options["num_cpus"] = max(
                os.cpu_count() or 1, int(settings.workers * settings.num_cpus)
            )
    problem: Exception | None = None
    for _ in range(_CONNECT_TRIES):
        try:
            ray.init(**options)
            return True
        except Exception as error:  # noqa: BLE001 - Ray raises plain ones here
            # On a busy machine Ray's own servers may take longer to come up than it waits.
            ray.shutdown()
            problem = error
    assert problem is not None
    where = settings.address or "a local cluster"
    raise ClusterError(f"Ray: {where} can't be reached or started: {_reason(problem)}") from problem


def _lifeline(*, ours: bool) -> Lifeline:
    """What this process hangs on now that it is connected; nobody brings a GCS of `ours` back."""
    context: Any = ray.get_runtime_context()
    here = context.get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    mine = next((node for node in nodes if node["NodeID"] == here), None)
    host, _, port = str(context.gcs_address).rpartition(":")
    return Lifeline(
        None if mine is None else (str(mine["NodeManagerAddress"]), int(mine["NodeManagerPort"])),
        (host.strip("[]"), int(port)),
        0.0 if ours else _CONTROL_GRACE_S,
    )


def _reason(error: BaseException) -> str:
    """The error in one line; of a traceback that came from a worker, its last."""
    lines = [line for line in str(error).splitlines() if line.strip(" ^~")]
    if len(lines) > 1 and "ray::" in lines[0]:
        return one_line(RuntimeError(lines[-1]))
    return f"{type(error).__name__}: {one_line(error)}"
