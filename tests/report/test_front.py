from __future__ import annotations

from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
from tests.run.synthetic import Search
from tests.searchers.landscapes import toy

from depthsearch.journal import read_journal
from depthsearch.report import run_report
from depthsearch.report.data import read_run
from depthsearch.report.front import front_table, staircase
from depthsearch.run.loop import Outcome
from depthsearch.run.planning import Plan
from depthsearch.space import Budget, Mask, Status

OWN = Budget("params", ratio=0.75, of="blocks")
SPACE = replace(
    toy(6, OWN),
    front=(Budget("params", ratio=0.9, of="blocks"), Budget("kv_bytes", ratio=0.6)),
)


def searched(folder: Path) -> Outcome:
    """A run over three budgets, as its journal tells it."""
    folder.mkdir()
    start = {"version": "0", "signature": {}, "config": {}, "space": SPACE.to_json()}
    plan = Plan("front", max_evaluations=80, finalists=3)
    return Search(folder / "journal.jsonl", plan, space=SPACE, start=start).run()


def test_the_stairs_are_the_lowest_loss_at_each_cost() -> None:
    rng = np.random.default_rng(0)
    points = [(float(c), float(v)) for c, v in rng.integers(0, 20, (60, 2))]
    line = staircase(points)
    for cost in range(20):
        reachable = [loss for c, loss in points if c <= cost]
        steps = [loss for c, loss in line if c <= cost]
        assert (min(reachable) if reachable else None) == (steps[-1] if steps else None)


def test_the_answers_are_those_of_the_finals(tmp_path: Path) -> None:
    outcome = searched(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert [entry.number for entry in run.front] == [1, 2, 3]
    for entry, answer in zip(run.front, outcome.front, strict=True):
        assert entry.space == answer.space
        assert entry.best is not None
        assert entry.best.evaluation == answer.search
        assert (entry.fresh, entry.baseline) == (answer.finals, answer.baseline)
    assert run.best == outcome.best
    assert all(SPACE.fits(p.mask) for p in run.points if p.final)
    assert all(SPACE.fits(e.mask) for e in run.finals)
    for row, answer in zip(front_table(run).rows, outcome.front, strict=True):
        assert row[1] == answer.space.budget.text
        assert row[4].startswith(f"{answer.finals.loss:.4f}")
        share = 100 * SPACE.costs.cost("kv_bytes", answer.best) / SPACE.costs.total("kv_bytes")
        assert row[-1] == f"{share:.1f} %"


def test_before_the_finals_it_shows_the_best_so_far(tmp_path: Path) -> None:
    searched(tmp_path / "run")
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]))
    told = {
        entry["mask"]: entry["loss"]
        for record in read_journal(path)
        if record["op"] == "tell"
        for entry in record["evaluations"]
        if entry["status"] == Status.OK
    }
    final = [
        p["mask"]
        for record in read_journal(path)
        if record["op"] == "ask"
        for p in record["proposals"]
        if p["final"] and p["mask"] in told
    ]
    for entry in read_run(tmp_path / "run").front:
        assert entry.best is not None
        assert entry.fresh is None
        fitting = [key for key in final if entry.space.fits(Mask.from_key(key))]
        assert entry.best.evaluation.loss == min(told[key] for key in fitting)
    page = unescape(run_report(tmp_path / "run"))
    for point in SPACE.points:
        assert point.budget.text in page


def test_a_run_over_one_budget_has_no_such_section(tmp_path: Path) -> None:
    start = {"version": "0", "signature": {}, "config": {}, "space": toy(6, OWN).to_json()}
    Search(tmp_path / "journal.jsonl", Plan("front", max_evaluations=20), start=start).run()
    assert "Quality against cost" not in run_report(tmp_path)
