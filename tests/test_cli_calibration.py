"""`depthsearch calibrate-check` as a person calls it."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.commands import Cli
from tests.processes import start_command
from tests.tiny_runs import workplace_config, write_text

from depthsearch.config import resolved_yaml
from depthsearch.run.search import search

FILES = ["calibration.json", "calibration.jsonl", "config.yaml", "report.html"]


@pytest.fixture(scope="module")
def run(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search, whose best masks a check takes in."""
    out = tmp_path_factory.mktemp("searched") / "run"
    search(workplace_config(workplace, search={"max_evaluations": 24}), out)
    return out


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text of the same words, in another order."""
    return write_text(tmp_path_factory.mktemp("other") / "other.txt", seed=1)


@pytest.fixture(scope="module")
def config(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of the workplace, with absolute paths."""
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(resolved_yaml(workplace_config(workplace)), encoding="utf-8")
    return path


def test_tables_words_a_file_and_a_report(
    config: Path, run: Path, other: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "check"
    arguments = ("--masks", 8, "--draws", 2, "--lengths", "32", "--other", other, "--run", run)
    shown = cli("calibrate-check", config, "--out", out, *arguments)
    assert shown.code == 0, shown.err
    found = json.loads((out / "calibration.json").read_text())
    lines = [line.split("│")[1:-1] for line in shown.out.splitlines() if line.startswith("│")]
    names = [row["name"] for row in found["samples"]]
    assert [line[0].strip() for line in lines[: len(names)]] == names
    assert names[:2] == ["sample 1", "sample 2"]
    assert names[-2:] == ["windows of 32", "other.txt"]
    for line, row in zip(lines, found["samples"], strict=False):
        assert line[2].strip() == str(row["winner"] + 1)
        assert line[4].strip() == f"{row['gap']:+.4f}"
    sizes = lines[len(names) :]
    assert [line[0].strip() for line in sizes] == [f"{r['tokens']:,}" for r in found["sizes"]]
    for text in (*found["warnings"], *found["notes"], found["verdict"]):
        assert text in shown.out
    assert "The run chose its masks on text of its own" in shown.out
    assert found["run"] == "run"
    assert any(entry["origin"].startswith("the run's, ") for entry in found["masks"])
    assert sorted(path.name for path in out.iterdir()) == FILES
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Is the winner stable over the calibration text?" in page
    assert page.count("<img ") == 3
    again = cli("report", out)
    assert again.code == 0
    assert (out / "report.html").read_text(encoding="utf-8") == page
    assert str(tmp_path) not in json.dumps(found)


def test_json_is_the_file(config: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "check"
    shown = cli(
        "calibrate-check", config, "--out", out, "--masks", 4, "--draws", 2, "--json",
        "--set", "calibration.select_tokens=128",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    found = json.loads(shown.out)
    assert found == json.loads((out / "calibration.json").read_text())
    assert found["select_tokens"] == 128


def test_mistakes_end_with_one_line_and_two(
    config: Path, run: Path, other: Path, tmp_path: Path, cli: Cli
) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text('{"text": "a word"}\n')
    cases: tuple[tuple[tuple[Any, ...], str], ...] = (
        ((tmp_path / "none.yaml",), "none.yaml"),
        ((config, "--masks", 1), "--masks is 1: give 2 or more"),
        ((config, "--draws", 1), "--draws is 1: give 2 or more"),
        ((config, "--draws", 90), "ask for fewer"),
        ((config, "--lengths", "1k"), "--lengths is '1k'"),
        ((config, "--lengths", "4096"), "--lengths holds 4096"),
        ((config, "--sizes", "8"), "--sizes holds 8"),
        ((config, "--other", tmp_path / "none.txt"), "none.txt"),
        ((config, "--other", table, "--column", "title"), "no column 'title'"),
        ((config, "--column", "text"), "1 columns and 0 other texts"),
        ((config, "--run", tmp_path), "is not a run directory"),
        (
            (config, "--run", run, "--set", "space.budget.keep_params=0.5"),
            "searched another space or budget",
        ),
        (
            (config, "--run", run, "--set", "calibration.heldout_fraction=0.5"),
            "held out 0.25 and may have searched on the rest",
        ),
        (
            (config, "--run", run, "--set", f"calibration.text={other}"),
            "searched on another calibration text",
        ),
        ((config, "--set", "calibration.heldout_tokens=16"), "at least 2 windows of held-out"),
        ((config, "--set", "search.method=guess"), "guess"),
    )
    for arguments, message in cases:
        shown = cli("calibrate-check", *arguments, "--out", tmp_path / "out")
        assert shown.code == 2, shown.out
        assert message in shown.message
        assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_left_as_it_is(
    config: Path, run: Path, tmp_path: Path, cli: Cli
) -> None:
    before = sorted(path.name for path in run.iterdir())
    shown = cli("calibrate-check", config, "--out", run)
    assert shown.code == 2
    assert "is no calibration check" in shown.message
    assert sorted(path.name for path in run.iterdir()) == before


def test_ctrl_c_leaves_what_the_same_command_continues(
    config: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "check"
    arguments = (
        "calibrate-check", str(config), "--out", str(out), "--draws", "3",
        "--set", "calibration.batch_tokens=16",
    )  # fmt: skip
    running = start_command(*arguments)
    journal = out / "calibration.jsonl"
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 6:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "a calibration check with the same command" in err
    assert sorted(path.name for path in out.iterdir()) == ["calibration.jsonl", "config.yaml"]
    known = journal.read_bytes()
    shown = cli(*arguments)
    assert shown.code == 0, shown.err
    assert journal.read_bytes().startswith(known)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert re.search(r"The winner (is|depends)", shown.out)
