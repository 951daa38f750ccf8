"""Reading a run directory at any moment of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from depthsearch.errors import JournalError, RunDirectoryError
from depthsearch.report.data import family, flatten, read_run

WriteRun = Callable[..., Path]


def test_a_finished_run_is_read_whole(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run", generations=4)
    records = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    run = read_run(folder)
    told = [e for r in records if r["op"] == "tell" for e in r["evaluations"]]
    assert len(run.points) == len(told)
    assert [p.evaluation.to_json() for p in run.points] == told
    assert run.end_reason == "budget"
    assert run.best is not None
    assert run.best.key == records[-1]["best"]
    assert run.cost_tokens == records[-1]["cost_tokens"]
    assert run.seconds == pytest.approx(4.2 * (len(records) - 1))
    assert run.by_status["non_finite"] == 1
    assert sum(run.by_status.values()) == sum(run.by_family.values()) == len(told)


def test_ranking_holds_only_complete_masks_on_budget(tmp_path: Path, write_run: WriteRun) -> None:
    run = read_run(write_run(tmp_path / "run", generations=4))
    losses = [p.evaluation.loss for p in run.ranked]
    assert losses == sorted(losses, key=lambda x: x if x is not None else math.inf)
    assert all(run.space.on_budget(p.mask) for p in run.ranked)
    assert len({p.mask for p in run.ranked}) == len(run.ranked)
    assert len(run.elite(0.1, 5)) == max(5, math.ceil(0.1 * len(run.ranked)))


def test_the_lead_on_the_baseline_is_paired_on_fresh_data(
    tmp_path: Path, write_run: WriteRun
) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert run.best is not None
    assert run.best_baseline in run.baselines
    assert run.lead_on_baseline is not None
    ours, theirs = run.fresh[run.best], run.fresh[run.best_baseline]
    assert ours.loss is not None
    assert theirs.loss is not None
    assert run.lead_on_baseline[0] == pytest.approx(theirs.loss - ours.loss)
    assert run.lead_on_baseline[1] < (ours.stderr or 0) + (theirs.stderr or 0)


def test_an_unfinished_run_answers_with_the_best_so_far(
    tmp_path: Path, write_run: WriteRun
) -> None:
    run = read_run(write_run(tmp_path / "run", state="searching", generations=3))
    assert run.end_reason is None
    assert run.best == run.ranked[0].mask
    assert run.lead_on_baseline is None
    assert run.best_baseline is not None
    assert run.origin(run.best_baseline).startswith("window")


def test_a_torn_tail_costs_only_the_last_record(tmp_path: Path, write_run: WriteRun) -> None:
    whole = read_run(write_run(tmp_path / "whole", state="searching", generations=3))
    torn = read_run(write_run(tmp_path / "torn", state="torn", generations=3))
    assert 0 < len(torn.points) < len(whole.points)
    assert torn.points == whole.points[: len(torn.points)]


def test_a_told_prefix_is_read_as_far_as_it_goes(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run", state="searching", generations=2)
    lines = (folder / "journal.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["evaluations"] = last["evaluations"][:3]
    whole = len(read_run(folder).points)
    (folder / "journal.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    assert 0 < len(read_run(folder).points) < whole


def test_best_json_answers_where_the_journal_was_cut(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run", generations=2)
    answer = json.loads((folder / "best.json").read_text())["mask"]
    lines = (folder / "journal.jsonl").read_text().splitlines(keepends=True)
    (folder / "journal.jsonl").write_text("".join(lines[:-2]))
    run = read_run(folder)
    assert run.best is not None
    assert run.best.key == answer


def test_what_is_no_run_is_refused(tmp_path: Path, write_run: WriteRun) -> None:
    with pytest.raises(RunDirectoryError, match=r"is not a run directory: .* no journal\.jsonl"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "run", state="started")
    (folder / "best.json").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"best\.json is damaged: delete it"):
        read_run(folder)
    (folder / "best.json").unlink()
    (folder / "export.json").write_text("[]")
    with pytest.raises(
        RunDirectoryError, match=r"export\.json is damaged: .* export the run again"
    ):
        read_run(folder)
    (folder / "export.json").unlink()
    (folder / "config.yaml").write_text("model: [")
    assert read_run(folder).config["model"]["dtype"] == "bfloat16"


def test_an_unreadable_journal_is_named(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run", state="started")
    start = json.loads((folder / "journal.jsonl").read_text())
    del start["space"]["sites"]
    start["version"] = "0.0.9"
    (folder / "journal.jsonl").write_text(json.dumps(start) + "\n")
    with pytest.raises(JournalError, match=r"written by depthsearch 0\.0\.9, this is"):
        read_run(folder)
    (folder / "journal.jsonl").write_text("")
    with pytest.raises(JournalError, match="no start record yet"):
        read_run(folder)


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        ("window 12-18, best angle", "windows"),
        ("window 3.ffn-7.attention", "windows"),
        ("block influence of sites per cost", "block influence"),
        ("single removal", "single removal"),
        ("greedy step 3", "greedy"),
        ("evolution shift", "evolution"),
        ("tpe: trial 4", "tpe"),
        ("", "unknown"),
    ],
)
def test_origins_fall_into_families(origin: str, name: str) -> None:
    assert family(origin) == name


def test_nested_data_becomes_dotted_rows() -> None:
    data = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": "text", "f": None}
    assert flatten(data) == [("a.b", "1"), ("a.c.d", "[1, 2]"), ("e", "text"), ("f", "null")]


@pytest.mark.parametrize(
    ("names", "what"),
    [(["calibration.jsonl"], "a calibration check"), (["arms/a-seed0/x"], "a comparison")],
)
def test_what_is_unfinished_and_no_run_is_named(
    tmp_path: Path, names: list[str], what: str
) -> None:
    for name in ["config.yaml", *names]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(RunDirectoryError, match=f"holds {what} that has not finished"):
        read_run(tmp_path)
