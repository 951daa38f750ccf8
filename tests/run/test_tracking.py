from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.run.synthetic import Search
from tests.tiny_runs import workplace_config

from depthsearch.config import TrackingConfig, config_from_mapping
from depthsearch.errors import ConfigError
from depthsearch.journal import Journal, read_journal, without_times
from depthsearch.run.directory import BEST, CONFIG, JOURNAL
from depthsearch.run.ledger import Ledger
from depthsearch.run.planning import Plan
from depthsearch.run.search import resume, search
from depthsearch.run.session import Session
from depthsearch.run.tracking import FOLDER, Tracker, open_tracker, tracked

EVALUATIONS = 24


class Recorder:
    """A tracker that keeps what it is given, and may fail at one method."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[str] = []
        self.config: Mapping[str, Any] = {}
        self.steps: dict[int, Mapping[str, float]] = {}
        self.summary: Mapping[str, Any] = {}

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise OSError(f"no connection in {name}")

    def start(self, config: Mapping[str, Any]) -> None:
        self._call("start")
        self.config = config

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._call("log")
        assert step not in self.steps
        self.steps[step] = values

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._call("finish")
        self.summary = summary


class StoppedError(Exception):
    """Raised in the middle of a search."""


def configured(workplace: Path, session: Session, **tracking: Any) -> Session:
    config = workplace_config(
        workplace, search={"max_evaluations": EVALUATIONS}, tracking=tracking or {"kind": "none"}
    )
    return replace(session, config=config)


def run(session: Session, out: Path, tracker: Tracker | None = None, stop: int = 0) -> None:
    """A search that ends with StoppedError at its progress report number `stop`, if not 0."""
    left = stop

    def on_progress(_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise StoppedError

    search(session.config, out, session=session, tracker=tracker, on_progress=on_progress)


@pytest.fixture(scope="module")
def untracked(
    session: Session, workplace: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:  # fmt: skip
    out = tmp_path_factory.mktemp("untracked") / "run"
    run(configured(workplace, session), out)
    return out


def journal_of(out: Path) -> str:
    return without_times(read_journal(out / JOURNAL))


def test_a_tracker_gets_each_step_once(
    session: Session, workplace: Path, tmp_path: Path, untracked: Path
) -> None:
    tracker = Recorder()
    run(configured(workplace, session), tmp_path / "run", tracker)
    records = read_journal(tmp_path / "run" / JOURNAL)
    told = [record for record in records if record["op"] == "tell"]
    assert tracker.calls == ["start", *["log"] * len(told), "finish"]
    assert list(tracker.steps) == list(range(len(told)))
    best = [values["best_loss"] for values in tracker.steps.values()]
    assert best == sorted(best, reverse=True)
    for values, record in zip(tracker.steps.values(), told, strict=True):
        losses = [e["loss"] for e in record["evaluations"] if e["loss"] is not None]
        assert values["mean_loss"] == pytest.approx(sum(losses) / len(losses))
        assert values["cost_tokens"] == record["cost_tokens"]
    assert tracker.summary["state"] == "finished"
    assert tracker.summary["best_mask"] == records[-1]["best"]
    assert tracker.summary["evaluations"] == EVALUATIONS
    assert tracker.config["run"].startswith("run-")
    assert tracker.config["search"]["max_evaluations"] == EVALUATIONS
    assert str(workplace.parent) not in str(tracker.config)
    assert journal_of(tmp_path / "run") == journal_of(untracked)


def test_a_resumed_search_goes_on_where_the_tracker_was(
    session: Session, workplace: Path, tmp_path: Path, untracked: Path
) -> None:
    settings = configured(workplace, session)
    first, second = Recorder(), Recorder()
    with pytest.raises(StoppedError):
        run(settings, tmp_path / "run", first, stop=12)
    assert first.summary["state"] == "stopped"
    resume(tmp_path / "run", session=settings, tracker=second)
    assert second.summary["state"] == "finished"
    assert first.steps
    assert second.steps
    assert second.config == first.config
    whole = Recorder()
    run(settings, tmp_path / "whole", whole)
    assert first.steps | second.steps == whole.steps
    assert not set(first.steps) & set(second.steps)
    assert journal_of(tmp_path / "run") == journal_of(untracked)


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_given_up_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    tracker = Recorder(fails=method)
    plan = Plan("evolution", max_evaluations=40, finalists=3)
    start = {"version": "0", "signature": {}, "config": {}}
    plain = Search(tmp_path / "plain", plan, start=start)
    tracked_search = Search(tmp_path / "journal", plan, start=start)
    outcome = plain.run()
    with caplog.at_level(logging.WARNING), tracked(tracker, tmp_path / "run") as on_record:
        assert tracked_search.run(on_record) == outcome
    assert (tmp_path / "journal").exists()
    assert tracker.calls.count(method) == 1
    assert tracker.calls[-1] == method
    (warning,) = caplog.messages
    assert "the search goes on: OSError: no connection" in warning
    assert without_times(read_journal(tmp_path / "journal")) == without_times(
        read_journal(tmp_path / "plain")
    )


def test_a_run_has_one_name_from_wherever_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place, folder in enumerate((tmp_path, Path())):
        tracker = Recorder()
        plan = Plan("evolution", max_evaluations=20, finalists=3)
        start = {"version": "0", "signature": {}, "config": {}}
        with tracked(tracker, folder) as on_record:
            Search(tmp_path / f"journal{place}", plan, start=start).run(on_record)
        assert tracker.config["run"].startswith(f"{tmp_path.name}-")


def test_a_search_that_never_started_is_not_tracked(tmp_path: Path) -> None:
    tracker = Recorder()
    with pytest.raises(StoppedError), tracked(tracker, tmp_path):
        raise StoppedError
    assert tracker.calls == []


def test_the_ledger_tells_what_is_new(tmp_path: Path) -> None:
    seen: list[tuple[str, bool]] = []
    for _ in range(2):
        with Journal(tmp_path / "journal") as journal:
            ledger = Ledger(journal, lambda record, new: seen.append((record["op"], new)))
            ledger.commit({"op": "start"})
            ledger.recall("hints", lambda: {"op": "hints"})
    assert seen == [("start", True), ("hints", True), ("start", False), ("hints", False)]


class TestConfiguration:
    def test_it_is_off_by_default(self, tmp_path: Path) -> None:
        assert open_tracker(TrackingConfig(), tmp_path) is None
        data = {"model": {"path": "m"}, "calibration": {"text": "t"},
                "space": {"budget": {"drop_sites": 2}}}  # fmt: skip
        assert config_from_mapping(data).tracking.kind == "none"
        for wrong in ({"kind": "excel"}, {"project": "a/b"}, {"project": ""}, {"where": ""}):
            with pytest.raises(ConfigError, match=f"tracking.{next(iter(wrong))}"):
                config_from_mapping(data | {"tracking": wrong})

    @pytest.mark.parametrize(
        ("kind", "module", "package"),
        [
            ("tensorboard", "torch.utils.tensorboard", "tensorboard"),
            ("wandb", "wandb", "wandb"),
            ("mlflow", "mlflow", "mlflow"),
        ],
    )
    def test_a_missing_library_is_named_before_anything_is_created(
        self,
        session: Session,
        workplace: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
        module: str,
        package: str,
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        settings = configured(workplace, session, kind=kind)
        with pytest.raises(ConfigError, match=f"pip install {package}"):
            run(settings, tmp_path / "run")
        assert list(tmp_path.iterdir()) == []


# The libraries themselves, where they are installed. Their own warnings are not this project's.
own_warnings = pytest.mark.filterwarnings("ignore")


def interrupted_and_resumed(session: Session, out: Path) -> None:
    with pytest.raises(StoppedError):
        run(session, out, stop=12)
    resume(out, session=session)
    assert (out / BEST).exists()
    assert yaml.safe_load((out / CONFIG).read_text())["tracking"]["kind"] != "none"


def expected_steps(out: Path) -> dict[int, float]:
    told = [record for record in read_journal(out / JOURNAL) if record["op"] == "tell"]
    return {step: record["cost_tokens"] for step, record in enumerate(told)}


@own_warnings
def test_tensorboard(
    session: Session, workplace: Path, tmp_path: Path, untracked: Path
) -> None:  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    interrupted_and_resumed(configured(workplace, session, kind="tensorboard"), out)
    (folder,) = (out / FOLDER).iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("cost_tokens")}
    assert found == pytest.approx(expected_steps(out))
    assert set(events.Tags()["scalars"]) == {"best_loss", "mean_loss", "cost_tokens", "evaluations"}
    assert str(workplace.parent) not in str([path.read_bytes() for path in folder.iterdir()])
    assert journal_of(out) == journal_of(untracked)


@own_warnings
def test_wandb_offline(
    session: Session,
    workplace: Path,
    tmp_path: Path,
    untracked: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    interrupted_and_resumed(configured(workplace, session, kind="wandb"), out)
    runs = sorted((out / FOLDER / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({path.name.split("-", 3)[-1] for path in runs}) == 1
    written = b"".join(path.read_bytes() for folder in runs for path in folder.glob("*.wandb"))
    for key in ("best_loss", "mean_loss", "cost_tokens", "evaluations", "finals_loss"):
        assert key.encode() in written
    assert str(workplace.parent).encode() not in written
    assert journal_of(out) == journal_of(untracked)


@own_warnings
def test_mlflow(session: Session, workplace: Path, tmp_path: Path, untracked: Path) -> None:
    import mlflow

    out = tmp_path / "run"
    interrupted_and_resumed(configured(workplace, session, kind="mlflow", project="cuts"), out)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{out / FOLDER / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("cuts")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "cost_tokens")
    assert {metric.step: metric.value for metric in history} == pytest.approx(expected_steps(out))
    assert len(history) == len(expected_steps(out))
    assert found.data.params["search.max_evaluations"] == str(EVALUATIONS)
    assert found.data.metrics["final.evaluations"] == EVALUATIONS
    assert str(workplace.parent) not in str(found.data)
    assert journal_of(out) == journal_of(untracked)
