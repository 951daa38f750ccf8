"""Real processes that share one Optuna study, some of them killed."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from tests.commands import Cli
from tests.postgresql import postgresql
from tests.processes import start_command
from tests.run.synthetic import Search
from tests.searchers.landscapes import toy
from tests.tiny_models import save_tiny
from tests.tiny_runs import write_config, write_text

from depthsearch.errors import ConfigError, JournalError
from depthsearch.evaluation import Racing
from depthsearch.journal import read_journal, without_times
from depthsearch.run.directory import BEST, JOURNAL
from depthsearch.run.planning import Plan

WAIT_S = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of six blocks and a text."""
    found = tmp_path_factory.mktemp("shared")
    save_tiny(found / "model", "llama", blocks=6)
    write_text(found / "text.txt")
    return found


def run_file(folder: Path, name: str, url: str, **search: Any) -> Path:
    options = {"storage": url, "shared": True, "study_name": "both"}
    settings = {"method": "optuna", "max_evaluations": 48, "finalists": 2, "batch": 4}
    return write_config(
        folder / f"{name}.yaml",
        search=settings | {"options": options} | search,
        calibration={"select_tokens": 512, "batch_tokens": 32},
    )


def wait_for_tells(running: subprocess.Popen[str], run: Path, count: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and running.poll() is None:
        if (run / JOURNAL).exists() and (run / JOURNAL).read_text().count('{"op":"tell"') >= count:
            return
        time.sleep(0.005)
    raise AssertionError(running.communicate()[1])


def share(folder: Path, name: str, url: str) -> list[Path]:
    """Two processes on one study, the second killed in the middle and resumed; their runs."""
    config = run_file(folder, name, url)
    runs = [folder / f"{name}-a", folder / f"{name}-b"]
    first, second = (start_command("search", config, "--out", r, cwd=folder) for r in runs)
    try:
        wait_for_tells(second, runs[1], 3)
        second.send_signal(signal.SIGKILL)
        assert second.communicate(timeout=WAIT_S)[0] is not None
        assert second.returncode == -signal.SIGKILL
        assert not (runs[1] / BEST).exists()
        second = start_command("resume", runs[1], cwd=folder)
        for running in (first, second):
            _, err = running.communicate(timeout=WAIT_S)
            assert running.returncode == 0, err
    finally:
        first.kill()
        second.kill()
    return runs


def trials_of(url: str) -> list[optuna.trial.FrozenTrial]:
    """The trials of the study; no connection to the server stays open."""
    storage = RDBStorage(url)
    try:
        return optuna.load_study(study_name="both", storage=storage).get_trials()
    finally:
        storage.engine.dispose()


def check_shared(runs: list[Path], url: str) -> None:
    """What both journals say is in the study, once, and nothing is left running there."""
    trials = trials_of(url)
    assert all(trial.state.is_finished() for trial in trials)
    members = []
    for run in runs:
        records = read_journal(run / JOURNAL)
        (join,) = [record for record in records if record["op"] == "join"]
        members.append(join["member"])
        own = [
            t
            for t in trials
            if t.user_attrs["run"] == join["member"] and t.user_attrs["origin"] != "duplicate"
        ]
        told = {e["mask"]: e for r in records if r["op"] == "tell" for e in r["evaluations"]}
        done = [t for t in own if t.state is TrialState.COMPLETE]
        assert Counter(t.user_attrs["mask"] for t in done) == Counter(list(told))
        for trial in done:
            evaluation = told[trial.user_attrs["mask"]]
            assert trial.user_attrs["status"] == evaluation["status"]
            if evaluation["status"] == "ok":
                assert trial.value == pytest.approx(evaluation["loss"], rel=1e-12)
        best = json.loads((run / BEST).read_text())
        assert len(told) == best["evaluations"] <= 48
        costs = {t.user_attrs["mask"]: t.user_attrs["cost"] for t in own}
        assert costs[best["mask"]] == best["cost"]
        assert 0 < min(costs.values()) <= max(costs.values()) <= best["cap"]
        spent = [r["cost_tokens"] for r in records if "cost_tokens" in r]
        assert spent == sorted(spent)
    assert len(set(members)) == 2
    assert {t.user_attrs["run"] for t in trials} == set(members)


def test_a_shared_search_cut_by_halving_is_resumed(tmp_path: Path) -> None:
    options = {"storage": f"sqlite:///{tmp_path / 'study.db'}", "shared": True, "batch": 8}
    plan = Plan("optuna", options, max_evaluations=40, racing=Racing("halving"))
    one = Search(tmp_path / "a.jsonl", plan, space=toy(6))
    one.run()
    whole = one.path.read_bytes()
    assert b'"stages"' in whole
    one.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    one.run()
    assert read_journal(one.path)[-1]["op"] == "end"


@pytest.mark.timeout(1200)
def test_two_processes_share_a_sqlite_study_and_one_is_killed(cli: Cli, folder: Path) -> None:
    url = f"sqlite:///{folder / 'study.db'}"
    runs = share(folder, "sqlite", url)
    check_shared(runs, url)
    before = (runs[1] / JOURNAL).read_bytes()
    count = len(trials_of(url))
    assert cli("resume", runs[1]).code == 0
    assert (runs[1] / JOURNAL).read_bytes() == before
    assert len(trials_of(url)) == count
    found = cli("search", run_file(folder, "other", url, seed=1), "--out", folder / "other")
    assert found.code == 2
    assert "shared by another search, which differs in: " in found.message
    assert "seed" in found.message
    assert not (folder / "other").exists()


@pytest.mark.timeout(1200)
def test_two_processes_share_a_postgresql_study_and_one_is_killed(folder: Path) -> None:
    with postgresql() as url:
        runs = share(folder, "postgresql", url)
        check_shared(runs, url)
        start = read_journal(runs[0] / JOURNAL)[0]
        assert start["config"]["search"]["options"]["storage"] == "(not recorded)"


def searched(path: Path, url: str, **changes: Any) -> Search:
    plan = {"seed": 5, "max_evaluations": 40, "finalists": 2, "ask": 4, **changes}
    options = {"storage": url, "shared": True}
    return Search(path, Plan("optuna", options=options, **plan), space=toy(8))


def states(url: str) -> Counter[TrialState]:
    return Counter(t.state for t in optuna.load_study(study_name="depthsearch", storage=url).trials)


def test_cut_anywhere_the_journal_is_followed_and_the_search_goes_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    searched(tmp_path / "other.jsonl", url, max_evaluations=24).run()
    search = searched(tmp_path / "journal.jsonl", url)
    outcome = search.run()
    lines = search.path.read_bytes().splitlines(keepends=True)
    ops = [record["op"] for record in read_journal(search.path)]
    asks = ops.count("ask")
    assert ops == ["start", "hints", "join", *["ask", "tell"] * asks, "stop", "finals", "end"]
    for cut in (len(lines) - 2, len(lines) - 4, 6, 3):
        search.path.write_bytes(b"".join(lines[:cut]))
        again = search.run()
        assert search.path.read_bytes().splitlines(keepends=True)[:cut] == lines[:cut]
        assert again.evaluations <= outcome.evaluations
        told = [e["mask"] for r in read_journal(search.path) if r["op"] == "tell"
                for e in r["evaluations"]]  # fmt: skip
        assert len(told) == len(set(told)) == again.evaluations
        assert TrialState.RUNNING not in states(url)
        if cut >= len(lines) - 2:
            assert again == outcome
    before, count = without_times(read_journal(search.path)), states(url)
    search.run()
    assert without_times(read_journal(search.path)) == before
    assert states(url) == count
    assert sum(search.select.units.values()) == 0


def test_the_study_can_be_rebuilt_from_the_journal(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    search = searched(tmp_path / "journal.jsonl", url)
    outcome = search.run()
    (tmp_path / "study.db").unlink()
    assert search.run() == outcome
    known = {e["mask"]: e for r in read_journal(search.path) if r["op"] == "tell"
             for e in r["evaluations"]}  # fmt: skip
    trials = optuna.load_study(study_name="depthsearch", storage=url).trials
    told = {t.user_attrs["mask"]: t.value for t in trials}
    assert told.keys() == known.keys()
    whole = {mask: e["loss"] for mask, e in known.items() if e["status"] == "ok"}
    assert len(whole) >= 4
    assert {mask: told[mask] for mask in whole} == pytest.approx(whole, rel=1e-12)


def test_the_cost_limit_leaves_nothing_running(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    search = searched(tmp_path / "journal.jsonl", url, max_evaluations=None, cost_tokens=2500.0)
    outcome = search.run()
    assert outcome.reason == "budget"
    assert outcome.cost_tokens <= 2500
    assert TrialState.RUNNING not in states(url)
    lines = search.path.read_bytes().splitlines(keepends=True)
    for cut in (len(lines), len(lines) - 1, len(lines) - 2):
        search.path.write_bytes(b"".join(lines[:cut]))
        assert search.run() == outcome


def test_another_ask_in_the_journal_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    search = searched(tmp_path / "journal.jsonl", url)
    search.run()
    search.plan = Plan(**{**vars(search.plan), "racing": False})
    with pytest.raises(JournalError, match="differ in 'survivors'"):
        search.run()


def test_runs_of_another_model_are_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    searched(tmp_path / "a.jsonl", url).run()
    other = searched(tmp_path / "b.jsonl", url)
    other.start = {"version": "0", "signature": {"model": {"fingerprint": "another"}}}
    with pytest.raises(ConfigError, match="differs in: model;"):
        other.run()
