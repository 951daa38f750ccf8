from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.run.synthetic import Search
from tests.searchers.landscapes import toy

from depthsearch.report import run_report
from depthsearch.report.data import RunData, read_run
from depthsearch.report.front import front_picture
from depthsearch.report.pairs import has_pairs, left_out, pair_lines, pairs_picture
from depthsearch.run.planning import Plan
from depthsearch.space import Budget, SearchSpace

OWN = Budget("params", ratio=0.75, of="blocks")
LOOSE = Budget("params", ratio=0.9, of="blocks")


def pair(first: Budget, cache: float) -> Budget:
    return replace(first, also=Budget("kv_bytes", ratio=cache, of="blocks"))


BASE = toy(6, OWN, protected=(0,))
SPACE = replace(
    BASE, front=tuple(pair(first, cache) for first in (OWN, LOOSE) for cache in (0.7, 0.4))
)
FRONT = {
    "budgets": [{"keep_params": 0.9, "of": "blocks"}],
    "second": [{"keep_kv_bytes": ratio, "of": "blocks"} for ratio in (0.7, 0.4, 0.1)],
}


def searched(folder: Path, space: SearchSpace = SPACE) -> RunData:
    folder.mkdir()
    config = {"front": FRONT} if space.front else {}
    start = {"version": "0", "signature": {}, "config": config, "space": space.to_json()}
    plan = Plan("front", max_evaluations=120, finalists=3)
    Search(folder / "journal.jsonl", plan, space=space, start=start).run()
    return read_run(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return searched(tmp_path_factory.mktemp("pairs") / "run")


def test_a_line_is_the_budgets_with_one_second_cap(run: RunData) -> None:
    lines = pair_lines(run)
    budgets = [[entry.space.budget for entry in line.entries] for line in lines]
    assert budgets == [
        [OWN],
        [pair(LOOSE, 0.7), pair(OWN, 0.7)],
        [pair(LOOSE, 0.4), pair(OWN, 0.4)],
    ]
    known = [p.evaluation for p in run.by_mask.values()]
    # 70 % and 40 % of 12 units of cache, two an attention.
    for line, most in zip(lines, (12, 8, 4), strict=True):
        within = [2 * sum(e.mask.keep[::2]) <= most for e in known]
        assert [line.holds(evaluation) for evaluation in known] == within
        assert any(within)
    assert not all(lines[2].holds(evaluation) for evaluation in known)


def test_the_picture_says_every_answer(run: RunData) -> None:
    found = pairs_picture(run)
    assert found is not None
    for entry in run.front:
        assert entry.best is not None
        said = f"{entry.number}: {entry.space.budget.text}, {entry.best.evaluation.loss:.4f} nats"
        assert said in found.alt


def test_losses_are_in_their_own_unit(run: RunData) -> None:
    by_angle = replace(run, config=run.config | {"search": {"score": "angular"}})
    for draw in (pairs_picture, front_picture):
        found = draw(by_angle)
        assert found is not None
        assert "half turns" in found.alt
        assert "nats" not in found.alt


def test_what_no_mask_meets_is_named(run: RunData) -> None:
    # The first attention stays: two of twelve units of cache.
    assert left_out(run) == (pair(OWN, 0.1).text, pair(LOOSE, 0.1).text)


def test_a_front_of_one_cost_is_drawn_as_before(tmp_path: Path) -> None:
    run = searched(tmp_path / "run", replace(BASE, front=(LOOSE,)))
    assert not has_pairs(run)
    assert left_out(run) == ()
    page = run_report(tmp_path / "run")
    assert "Grey ones are beaten" in page
    assert "A line is the lowest loss found" not in page
