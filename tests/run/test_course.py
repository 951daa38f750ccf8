from __future__ import annotations

from pathlib import Path

from tests.run.synthetic import Search

from depthsearch.journal import read_journal
from depthsearch.run.course import Course
from depthsearch.run.loop import Progress
from depthsearch.run.planning import Plan


def test_the_figures_are_those_that_the_search_reported(tmp_path: Path) -> None:
    reported: list[Progress] = []
    plan = Plan("evolution", max_evaluations=60, finalists=3)
    outcome = Search(tmp_path / "journal", plan, on_progress=reported.append).run()
    course = Course()
    after = []
    for record in read_journal(tmp_path / "journal"):
        course.feed(record)
        if record["op"] == "tell":
            after.append((course.cost_tokens, course.evaluations, course.best_loss))
    seen = {(p.cost_tokens, p.evaluations, p.best_loss) for p in reported}
    assert len(after) > 3
    assert set(after) <= seen
    assert course.best_mask == outcome.best.key
    assert course.finals_loss == outcome.finals.loss
    assert (course.evaluations, course.cost_tokens) == (outcome.evaluations, outcome.cost_tokens)
    assert course.reason == outcome.reason
    assert sum(course.statuses.values()) == outcome.evaluations
    assert sum(step.evaluations for step in course.steps) == outcome.evaluations


def test_masks_off_budget_have_no_best_loss(tmp_path: Path) -> None:
    """Greedy's intermediate masks are cheaper to lose than the ones that count."""
    Search(tmp_path / "journal", Plan("greedy", finalists=1)).run()
    course, lowest = Course(), float("inf")
    for record in read_journal(tmp_path / "journal"):
        course.feed(record)
        if record["op"] == "tell":
            lowest = min(lowest, *(e["loss"] for e in record["evaluations"] if e["loss"]))
    assert course.best_loss is not None
    assert lowest < course.best_loss


def test_an_ask_of_failures_has_no_mean() -> None:
    course = Course()
    mask = "11"
    course.feed({"op": "ask", "proposals": [{"mask": mask, "final": True}], "time": 1.0})
    failed = {"mask": mask, "loss": None, "losses": [], "status": "failed", "tokens": 0}
    course.feed({"op": "tell", "evaluations": [failed], "cost_tokens": 5.0, "time": 2.0})
    assert (course.mean_loss, course.best_loss) == (None, None)
    assert course.statuses == {"failed": 1}
