"""The real optuna-dashboard on the study of a running search."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from landscapes import FRONTS, Landscape, drive, toy

from depthsearch.searchers import build_searcher
from depthsearch.searchers.optuna_keys import OptunaSearcher

pytest.importorskip("optuna_dashboard", reason="needs the package optuna-dashboard")

WAIT_S = 120


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture
def dashboard(url: str, tmp_path: Path) -> Iterator[str]:
    """The dashboard's address, on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "import sys; from optuna_dashboard._cli import main; sys.argv[0] = 'd'; main()"
    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(
            [sys.executable, "-c", command, url, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + WAIT_S
        while True:
            assert running.poll() is None, (tmp_path / "log").read_text()
            try:
                page = fetch(f"{address}/dashboard/")
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline, "the dashboard does not answer"
                time.sleep(0.2)
        assert b"<title>Optuna Dashboard" in page
        yield address
    finally:
        running.kill()
        running.wait()


def fetch(address: str) -> bytes:
    # Loopback needs no proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=WAIT_S) as answer:
        found: bytes = answer.read()
    return found


def shown(dashboard: str) -> list[dict[str, Any]]:
    """The trials as the dashboard's page gets them."""
    (summary,) = json.loads(fetch(f"{dashboard}/api/studies"))["study_summaries"]
    assert summary["study_name"] == "depthsearch"
    detail = json.loads(fetch(f"{dashboard}/api/studies/{summary['study_id']}"))
    trials: list[dict[str, Any]] = detail["trials"]
    return trials


def test_it_shows_a_search_while_it_runs(url: str, request: pytest.FixtureRequest) -> None:
    space, landscape = toy(8), Landscape(16)
    options = {"storage": url, "batch": 5}
    searcher = build_searcher("optuna", space, landscape.hints(), np.random.default_rng(0), options)
    assert isinstance(searcher, OptunaSearcher)
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=1)
    told = {e.mask.key: e.loss for _, found in record for e in found}
    asked = searcher.ask(5)
    dashboard = request.getfixturevalue("dashboard")
    trials = shown(dashboard)
    assert Counter(trial["state"] for trial in trials)["Running"] >= 5
    done = [trial for trial in trials if trial["state"] == "Complete"]
    assert {attribute(t, "mask"): t["values"][0] for t in done} == pytest.approx(told)
    assert all(int(attribute(t, "cost")) <= space.cap for t in trials)
    assert all(len(t["params"]) == len(space.genes) for t in trials)

    searcher.tell([landscape.evaluate(p.mask) for p in asked.proposals])
    deadline = time.monotonic() + WAIT_S
    trials = shown(dashboard)
    # It asks the storage anew only after some seconds.
    while any(trial["state"] == "Running" for trial in trials):
        assert time.monotonic() < deadline, "the dashboard does not follow the search"
        time.sleep(0.5)
        trials = shown(dashboard)
    told |= {p.mask.key: landscape.evaluate(p.mask).loss for p in asked.proposals}
    assert {attribute(t, "mask"): t["values"][0] for t in trials} == pytest.approx(told)


def test_it_shows_the_objectives_of_a_front(url: str, request: pytest.FixtureRequest) -> None:
    space, landscape = FRONTS["two costs"], Landscape(10)
    options = {"storage": url, "sampler": "nsga2"}
    rng = np.random.default_rng(0)
    searcher = build_searcher("optuna", space, landscape.hints(), rng, options)
    assert isinstance(searcher, OptunaSearcher)
    drive(searcher, lambda p: landscape.evaluate(p.mask), limit=40)
    dashboard = request.getfixturevalue("dashboard")
    (summary,) = json.loads(fetch(f"{dashboard}/api/studies"))["study_summaries"]
    assert summary["directions"] == ["minimize"] * 3
    detail = json.loads(fetch(f"{dashboard}/api/studies/{summary['study_id']}"))
    assert detail["objective_names"] == ["loss", "params", "kv_bytes"]
    assert {trial["number"] for trial in detail["best_trials"]} == {
        trial.number for trial in searcher.study.best_trials
    }


def attribute(trial: dict[str, Any], key: str) -> str:
    (value,) = [entry["value"] for entry in trial["user_attrs"] if entry["key"] == key]
    return str(value)
