"""Experiment trackers: a search's figures shown where a team collects them.

Off by default. The journal remains the record: results don't depend on a tracker, and one that
fails is given up with one warning while the search goes on.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from depthsearch.config import TrackingConfig
from depthsearch.errors import ConfigError
from depthsearch.run.course import Course
from depthsearch.run.ledger import OnRecord
from depthsearch.sources import one_line

FOLDER = "tracking"
_log = logging.getLogger(__name__)
_PACKAGES = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
}
"""Kind of tracker: the module it imports, the pip package that brings it."""


class Tracker(Protocol):
    """Where the figures of one search go; any method may raise, the search goes on without it."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin, or go on with, the run `config["run"]`.

        That name is the same whenever the run is resumed; the rest of `config` is the shareable
        configuration, without folders of this machine and secrets.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of the ask number `step`, from 0: losses in nats, cost_tokens, evaluations."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The end: `summary["state"]` is finished or stopped, its other figures the last known."""


def open_tracker(config: TrackingConfig, run: Path) -> Tracker | None:
    """The configured tracker for the run directory `run`, None for kind none.

    Writes nothing yet. Raises ConfigError naming the pip package if its library is missing.
    """
    if config.kind == "none":
        return None
    module, package = _PACKAGES[config.kind]
    # Nothing about this run goes to the makers of these libraries unless the user asks for it.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"tracking.kind is '{config.kind}', whose library can't be imported "
            f"({one_line(error)}): pip install {package}, or set tracking.kind to none"
        ) from error
    kinds: dict[str, Callable[[Any, str, str | None, Path], Tracker]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
        "mlflow": MLflow,
    }
    return kinds[config.kind](library, config.project, config.where, run)


@contextmanager
def tracked(tracker: Tracker | None, run: Path) -> Iterator[OnRecord]:
    """A callback for the ledger that passes a search's new steps on to `tracker`.

    Steps that a resumed search only repeats were passed on before. Leaving the context finishes the
    tracker, however the search ended. Warns once when the tracker fails, and never raises for it.
    """
    feed = _Feed(tracker, run.absolute().name)
    try:
        yield feed.take
    finally:
        feed.finish()


class _Feed:
    """What has become of a search so far, told to a tracker until that fails."""

    def __init__(self, tracker: Tracker | None, name: str) -> None:
        self._tracker = tracker
        self._name = name
        self._course = Course()
        self._started = False

    def take(self, record: Mapping[str, Any], new: bool) -> None:
        if self._tracker is None:
            return
        course = self._course
        course.feed(record)
        if record["op"] == "start":
            run = f"{self._name}-{round(float(record['time']) * 1000):x}"
            self._started = True
            self._try(lambda tracker: tracker.start({"run": run, **record["config"]}))
        elif record["op"] == "tell" and new:
            self._try(lambda tracker: tracker.log(course.asks - 1, self._values()))

    def finish(self) -> None:
        if not self._started:
            return
        course = self._course
        summary = {
            "state": "stopped" if course.reason is None else "finished",
            "reason": course.reason,
            "best_mask": course.best_mask,
            "finals_loss": course.finals_loss,
            "asks": course.asks,
            **self._values(),
        }
        known = {key: value for key, value in summary.items() if value is not None}
        self._try(lambda tracker: tracker.finish(known))

    def _values(self) -> dict[str, float]:
        course = self._course
        values = {
            "best_loss": course.best_loss,
            "mean_loss": course.mean_loss,
            "cost_tokens": course.cost_tokens,
            "evaluations": float(course.evaluations),
        }
        return {key: value for key, value in values.items() if value is not None}

    def _try(self, call: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except Exception as error:  # noqa: BLE001  (whatever a tracker raises must not end a search)
            self._tracker = None
            # Not a Python warning: the command line silences those of the model libraries.
            _log.warning(
                "the experiment tracker failed and gets nothing more, the search goes on: %s: %s",
                type(error).__name__,
                one_line(error),
            )


class TensorBoard:
    """Event files in `where`, by default `tracking/` of the run directory.

    Each run has a folder of its own below `where`, so that several can be compared.
    """

    def __init__(self, library: Any, project: str, where: str | None, run: Path) -> None:
        self._library = library
        self._folder = _folder(run, where) / ("" if where is None else project)
        self._writer: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Open the run's event file and write the configuration as text."""
        self._writer = self._library.SummaryWriter(log_dir=str(self._folder / _safe(config["run"])))
        rows = "\n".join(f"| {key} | {value} |" for key, value in _flat(config).items())
        self._writer.add_text("config", f"| setting | value |\n|---|---|\n{rows}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars, at once, so that a killed search leaves them."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary as text and close the file."""
        rows = "\n".join(f"| {key} | {value} |" for key, value in summary.items())
        self._writer.add_text("summary", f"| figure | value |\n|---|---|\n{rows}")
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run; its local files lie in `where`, by default `tracking/` of the run.

    Account, server and mode are wandb's own environment variables (WANDB_API_KEY, WANDB_BASE_URL,
    WANDB_MODE). The machine, the program and the code are not recorded.
    """

    def __init__(self, library: Any, project: str, where: str | None, run: Path) -> None:
        self._wandb = library
        self._project = project
        self._folder = _folder(run, where)
        self._run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin the run, or go on with it after a resume."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = self._wandb.init(
            project=self._project,
            id=_safe(config["run"]),
            name=config["run"],
            resume="allow",
            dir=str(self._folder),
            config=dict(config),
            settings=self._wandb.Settings(
                console="off",
                disable_git=True,
                save_code=False,
                silent=True,
                host="",
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
            ),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log figures of one step."""
        self._run.log(dict(values), step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Store the summary and end the run."""
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary["state"] == "finished" else 1)


class MLflow:
    """A run of the MLflow experiment `project`.

    `where` is a tracking server or database (anything with a scheme, such as http://host:5000), or
    a folder for an SQLite file, by default `tracking/` of the run directory. Credentials are
    MLflow's own environment variables (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_TOKEN ...).
    """

    _TAG = "depthsearch.run"

    def __init__(self, library: Any, project: str, where: str | None, run: Path) -> None:
        self._mlflow = library
        self._project = project
        self._where = where
        self._folder = _folder(run, where)
        self._client: Any = None
        self._id = ""

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin the run, or go on with it after a resume; settings become parameters."""
        uri = self._where
        if uri is None or ":" not in uri:
            self._folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{self._folder.resolve()}/mlflow.db"
        # A client of its own: the library's global one records the program, user and folder.
        client = self._mlflow.MlflowClient(tracking_uri=uri)
        self._client = client
        found = client.get_experiment_by_name(self._project)
        experiment = (
            client.create_experiment(self._project) if found is None else found.experiment_id
        )
        name = config["run"]
        known = client.search_runs([experiment], f"tags.`{self._TAG}` = '{_safe(name)}'")
        if known:
            self._id = known[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            return
        tags = {self._TAG: _safe(name)}
        self._id = client.create_run(experiment, tags=tags, run_name=name).info.run_id
        for key, value in _flat(config).items():
            client.log_param(self._id, key, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log figures of one step."""
        for key, value in values.items():
            self._client.log_metric(self._id, key, value, step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Store numbers as metrics and texts as tags, and end the run."""
        for key, value in summary.items():
            if isinstance(value, int | float):
                self._client.log_metric(self._id, f"final.{key}", float(value))
            else:
                self._client.set_tag(self._id, f"depthsearch.{key}", str(value))
        state = "FINISHED" if summary["state"] == "finished" else "KILLED"
        self._client.set_terminated(self._id, state)


def _folder(run: Path, where: str | None) -> Path:
    return run / FOLDER if where is None else run / Path(where).expanduser()


def _safe(name: str) -> str:
    """A name that every tracker takes as a folder or an id."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat
