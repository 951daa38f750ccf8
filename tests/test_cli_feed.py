"""`depthsearch feed` as a person calls it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.commands import Cli

from depthsearch.config import load_config
from depthsearch.run.search import search


@pytest.fixture(scope="module")
def run(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("feed") / "run"
    search(load_config(workplace / "run.yaml"), out)
    return out


def test_a_table_and_a_verdict(run: Path, cli: Cli) -> None:
    before = {path: path.read_bytes() for path in run.iterdir()}
    shown = cli("feed", run, "--workers", "16,1")
    assert shown.code == 0, shown.err
    out = shown.out
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["1", "16"]
    assert [cell.strip() for cell in rows[0]] == ["1", "100 %", "100 %", "1.0"]
    assert all(title in out for title in ("workers", "busy", "sharing", "speed-up"))
    assert "This search feeds no more than 1 worker with 80 % of the ideal speed-up" in out
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_json_holds_the_same(run: Path, cli: Cli) -> None:
    shown = cli("feed", run, "--json")
    found = json.loads(shown.out)
    assert shown.code == 0
    assert [row["workers"] for row in found["workers"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert found["batches"] == 4
    assert found["verdict"].startswith("This search feeds ")


def test_mistakes_end_with_one_line_and_two(run: Path, tmp_path: Path, cli: Cli) -> None:
    bare = shutil.copytree(run, tmp_path / "bare")
    first = (bare / "journal.jsonl").read_text().splitlines(keepends=True)[0]
    (bare / "journal.jsonl").write_text(first)
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "journal.jsonl").write_text(f"{first}{first[:40]}\n{first}")
    for arguments, message in (
        ((tmp_path / "missing",), "is not a run directory"),
        ((bare,), "holds no evaluations yet"),
        ((broken,), "line 2 is no record of a journal"),
        ((run, "--workers", "1,many"), "--workers is '1,many'"),
    ):
        shown = cli("feed", *arguments)
        assert shown.code == 2
        assert message in shown.message
