from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tests.processes import start_command
from tests.run.test_watching import WORKERS_JSON, write_run

from depthsearch import live
from depthsearch.cli import main
from depthsearch.run.directory import BEST
from depthsearch.run.watching import CompareState, RunState, Workers

STATE = RunState(
    run="first",
    phase="searching",
    method="evolution",
    seed=1,
    asks=12,
    best_loss=1.33371,
    cost_tokens=120_000.0,
    cost_limit_tokens=600_000.0,
    evaluations=40,
    statuses={"ok": 30, "out_of_memory": 10},
    evaluations_per_s=2.5,
    cost_tokens_per_s=1200.0,
    seconds_left=400.0,
    quiet_s=3.0,
    workers=Workers.from_json(WORKERS_JSON),
)


def pictured(state: RunState | CompareState) -> str:
    console = Console(width=100, force_terminal=False)
    with console.capture() as captured:
        console.print(live.picture(state))
    return captured.get()


def test_one_line_says_everything() -> None:
    (line,) = live.lines(STATE)
    assert line == (
        "first: searching, ask 12, best 1.3337, cost 120,000 of 600,000 tokens, "
        "40 masks (30 ok, 10 out of memory), 2.5 masks/s, 1,200 cost tokens/s, 06:40 left, "
        "workers: 1 busy, 1 dead; 45 units done, 3 queued, 2 issued again, quarantined: 1 (1101)"
    )


def test_a_terminal_shows_the_same_figures() -> None:
    text = pictured(STATE)
    for part in ("searching", "1.3337", "120,000 of 600,000", "06:40", "1 busy, 1 dead", "1101"):
        assert part in text


def test_a_stalled_run_says_what_to_do() -> None:
    stalled = replace(STATE, phase="stalled", quiet_s=4000.0, seconds_left=None)
    arms = CompareState("arms", False, (stalled,))
    for state, command in ((stalled, "`depthsearch resume`"), (arms, "`depthsearch compare`")):
        for text in (live.lines(state)[0], pictured(state)):
            assert "no record for 1:06:40" in " ".join(text.split())
            assert command in " ".join(text.split())


def test_an_arm_that_never_ran_has_failed_and_no_figures() -> None:
    (line,) = live.lines(CompareState("arms", True, (RunState("second", "failed"),)))
    assert line == "second: failed"


def test_a_comparison_has_a_line_for_each_run() -> None:
    state = CompareState("arms", False, (STATE, RunState("second", "waiting")))
    assert [line.split(",")[0] for line in live.lines(state)] == [
        "first: searching",
        "second: waiting",
    ]
    assert "second" in pictured(state)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("cli") / "run")


class TestCommand:
    @pytest.fixture
    def watch(
        self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., tuple[int, str, str]]:
        def run(*arguments: object) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", ["depthsearch", "watch", *map(str, arguments)])
            code = 0
            try:
                main()
            except SystemExit as stopped:
                code = int(stopped.code or 0)
            out, err = capfd.readouterr()
            return code, out, err

        return run

    def test_once(self, watch: Callable[..., tuple[int, str, str]], finished: Path) -> None:
        code, out, err = watch(finished, "--once")
        assert (code, err) == (0, "")
        assert out.startswith("run: done, ask ")
        assert len(out.splitlines()) == 1

    def test_json(self, watch: Callable[..., tuple[int, str, str]], finished: Path) -> None:
        code, out, err = watch(finished, "--json")
        assert (code, err) == (0, "")
        assert json.loads(out)["phase"] == "done"

    def test_a_finished_run_ends_the_watch(
        self, watch: Callable[..., tuple[int, str, str]], finished: Path
    ) -> None:
        assert watch(finished) == watch(finished, "--once")

    def test_bad_input_is_one_line(
        self, watch: Callable[..., tuple[int, str, str]], tmp_path: Path
    ) -> None:
        code, out, err = watch(tmp_path / "none")
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1

    def test_ctrl_c(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        (run / BEST).unlink()
        running = start_command("watch", run, "--interval", "0.1")
        assert running.stdout is not None
        first = running.stdout.readline()
        time.sleep(0.3)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
        assert first.startswith("run: ")
        assert running.returncode == 130
        assert out == ""
        assert err.splitlines() == [
            "depthsearch: no longer watching; the search itself is not touched"
        ]
