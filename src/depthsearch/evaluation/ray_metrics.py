"""Where a search stands, as metrics of Ray, which a cluster with `ray[default]` shows Prometheus.

Setting them opens no port: Ray's agent on the driver's node exports them, if there is one, under
the names here with `ray_` before them. Without an agent they go nowhere.
"""

from __future__ import annotations

import logging
from collections import Counter as Counts
from collections.abc import Callable, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from depthsearch.sources import one_line

_log = logging.getLogger(__name__)
_STATES = ("starting", "ready", "busy")


class Metrics:
    """The metrics of one run, which carry its name as the tag `run`.

    No method raises: at the first failure a warning is logged and no metric is set any more.
    """

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._counted = Counts[str]()
        self._given_up = False
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._try(self._make)

    def tell_state(self, state: Mapping[str, Any]) -> None:
        """Take over what the dispatcher says of workers and units (see `Dispatcher.state`)."""
        self._try(lambda: self._set_state(state))

    def tell_progress(self, evaluations: int, cost_tokens: float, best_loss: float | None) -> None:
        """Masks judged so far, their cost, and the lowest loss of those on budget."""
        values = {"evaluations": float(evaluations), "cost_tokens": cost_tokens}
        if best_loss is not None:
            values["best_loss"] = best_loss
        self._try(lambda: self._set(values))

    def _make(self) -> None:
        for name, said in {
            "quarantined_masks": "Masks given up because workers failed at them",
            "units_queued": "Units that no worker has yet",
            "evaluations": "Masks judged so far",
            "cost_tokens": "Cost so far: tokens through the dense model that would cost as much",
            "best_loss": "Lowest loss so far among the masks on budget, in its unit: nats for KL",
        }.items():
            self._gauges[name] = Gauge(f"depthsearch_{name}", said, tag_keys=("run",))
        self._gauges["workers"] = Gauge(
            "depthsearch_workers", "Workers by what they do", tag_keys=("run", "state")
        )
        for name, said in {
            "units_done": "Units computed",
            "units_reissued": "Units issued again after a failure",
        }.items():
            self._counters[name] = Counter(f"depthsearch_{name}", said, tag_keys=("run",))

    def _set_state(self, state: Mapping[str, Any]) -> None:
        states = Counts(worker["state"] for worker in state["workers"])
        for name in _STATES:
            self._gauges["workers"].set(states[name], {**self._tags, "state": name})
        for name, counter in self._counters.items():
            more = state[name] - self._counted[name]
            if more > 0:
                counter.inc(more, self._tags)
                self._counted[name] += more
        self._set(
            {
                "quarantined_masks": float(len(state["quarantined"])),
                "units_queued": float(state["units_queued"]),
            }
        )

    def _set(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._gauges[name].set(value, self._tags)

    def _try(self, call: Callable[[], None]) -> None:
        if self._given_up:
            return
        try:
            call()
        except Exception as error:  # noqa: BLE001 - no search ends because it can't be watched
            self._given_up = True
            _log.warning(
                "Ray's metrics fail (%s: %s); the search goes on without them",
                type(error).__name__,
                one_line(error),
            )
