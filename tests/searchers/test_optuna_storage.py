"""What a storage holds of a study, and how it is opened."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from depthsearch.errors import ConfigError, StorageError
from depthsearch.searchers.optuna_samplers import OptunaOptions
from depthsearch.searchers.optuna_storage import StoredStudy

JOIN = """
import sys, time
from pathlib import Path
from depthsearch.searchers.optuna_samplers import OptunaOptions
from depthsearch.searchers.optuna_storage import StoredStudy

url, folder, number = sys.argv[1:]
Path(folder, f"ready-{number}").touch()
while not Path(folder, "go").exists():
    time.sleep(0.001)
StoredStudy(OptunaOptions(storage=url, shared=True), {"model": "a"}, number)
"""


@pytest.mark.parametrize("scheme", ["sqlite:///", "journal:"])
def test_processes_that_begin_a_study_at_one_time_all_join_it(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}{tmp_path / 'study'}"
    count = 3
    running = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, url, str(tmp_path), str(number)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    while any(p.poll() is None for p in running) and len([*tmp_path.glob("ready-*")]) < count:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0] * count, errors
    StoredStudy(OptunaOptions(storage=url, shared=True), {"model": "a"}, "9")
    with pytest.raises(ConfigError, match="differs in: model;"):
        StoredStudy(OptunaOptions(storage=url, shared=True), {"model": "b"}, "9")


@pytest.mark.parametrize("scheme", ["sqlite:///", "journal:"])
def test_trials_are_copied_once_and_their_ends_follow(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}{tmp_path / 'study'}"
    stored = StoredStudy(OptunaOptions(storage=url, shared=True), {}, "1f")
    study = optuna.create_study()
    keys = {"key_00": FloatDistribution(0, 1)}
    trials = [study.ask(keys) for _ in range(3)]
    for trial in trials:
        trial.set_user_attr("mask", f"{trial.number}")
    study.tell(trials[0], 1.5)
    for _ in range(2):
        stored.sync(study)
    own = stored.own()
    assert [t.state for t in own.values()] == [TrialState.COMPLETE] + [TrialState.RUNNING] * 2
    assert [own[str(t.number)].params for t in trials] == [t.params for t in trials]
    trials[1].set_user_attr("status", "eliminated")
    study.tell(trials[1], 2.5)
    study.tell(trials[2], state=TrialState.FAIL)
    for _ in range(2):
        stored.sync(study)
    own = stored.own()
    assert [(t.state, t.value) for t in own.values()] == [
        (TrialState.COMPLETE, 1.5),
        (TrialState.COMPLETE, 2.5),
        (TrialState.FAIL, None),
    ]
    assert own["1"].user_attrs == {"mask": "1", "run": "1f", "status": "eliminated"}
    assert stored.news() == []
    other = StoredStudy(OptunaOptions(storage=url, shared=True), {}, "2e")
    assert [t.user_attrs["mask"] for t in other.news()] == ["0", "1"]
    assert other.news() == []
    assert other.own() == {}


def test_a_storage_that_breaks_is_one_line_without_its_address(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    stored = StoredStudy(OptunaOptions(storage=f"sqlite:///{path}"))
    path.write_bytes(b"no database" * 1000)
    study = optuna.create_study()
    study.ask()
    with pytest.raises(StorageError, match=r"storage \(sqlite:\.\.\.\) failed .*resume") as caught:
        stored.sync(study)
    assert "\n" not in str(caught.value)
    assert str(path) not in str(caught.value)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install depthsearch\[postgresql\]"):
        StoredStudy(OptunaOptions(storage="postgresql+psycopg://me:secret@host/x"))
