from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from tests.run.synthetic import Search
from tests.run.test_loop import journal_of, some_fail
from tests.searchers.landscapes import toy

from depthsearch.errors import ConfigError
from depthsearch.journal import read_journal
from depthsearch.run.loop import Outcome
from depthsearch.run.planning import Plan, check_cost
from depthsearch.run.points import Contest, paired_lead
from depthsearch.searchers import is_baseline
from depthsearch.space import Budget, Evaluation, Mask, SearchSpace, Status

OWN = Budget("params", ratio=0.75, of="blocks")
FURTHER = (
    Budget("params", ratio=0.9, of="blocks"),
    Budget("params", ratio=0.6, of="blocks"),
    Budget("kv_bytes", ratio=0.6),
)
SPACE = replace(toy(6, OWN), front=FURTHER)
PLAN = Plan("front", seed=5, max_evaluations=200, finalists=3)


def fresh_losses(search: Search) -> dict[Mask, tuple[float, ...]]:
    """What the finals' backend says of each finalist, computed here once more."""
    found = {}
    for entry in read_journal(search.path)[-2]["evaluations"]:
        mask = Mask.from_key(entry["mask"])
        found[mask] = tuple(
            loss
            for batch in range(search.finals.batches)
            for loss in search.finals.run(batch, [mask]).losses[0]
        )
    return found


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    return Search(tmp_path_factory.mktemp("points") / "journal.jsonl", PLAN, space=SPACE)


@pytest.fixture(scope="module")
def outcome(search: Search) -> Outcome:
    return search.run()


def test_every_budget_gets_its_answer(outcome: Outcome) -> None:
    assert [answer.space for answer in outcome.front] == list(SPACE.points)
    for answer in outcome.front:
        assert answer.space.fits(answer.best)
        assert answer.search.mask == answer.finals.mask == answer.best
    (own,) = (answer for answer in outcome.front if answer.space.budget == OWN)
    assert (own.best, own.finals) == (outcome.best, outcome.finals)
    assert len({answer.best for answer in outcome.front}) > 1


def test_each_answer_beats_its_best_baseline_or_is_it(search: Search, outcome: Outcome) -> None:
    losses = fresh_losses(search)
    origins = {
        Mask.from_key(p["mask"]): p["origin"]
        for record in read_journal(search.path)
        if record["op"] == "ask"
        for p in record["proposals"]
    }
    changed = 0
    for answer in outcome.front:
        fitting = [m for m in losses if answer.space.fits(m)]
        baselines = [m for m in fitting if is_baseline(origins[m])]
        best = min(fitting, key=lambda m: fmean(losses[m]))
        safe = min(baselines, key=lambda m: fmean(losses[m]))
        gaps = [a - b for a, b in zip(losses[best], losses[safe], strict=True)]
        wins = fmean(gaps) < -stdev(gaps) / len(gaps) ** 0.5 if best != safe else False
        assert answer.best == (best if wins or best == safe else safe)
        assert answer.baseline is not None
        assert answer.baseline.mask == safe
        assert answer.lead is not None
        assert answer.lead[0] == pytest.approx(
            fmean(losses[safe]) - fmean(losses[answer.best]), abs=1e-12
        )
        changed += answer.best != safe
    assert changed


def test_the_archive_is_what_nothing_beats(search: Search, outcome: Outcome) -> None:
    told = [
        Evaluation.from_json(entry)
        for record in read_journal(search.path)
        if record["op"] == "tell"
        for entry in record["evaluations"]
    ]
    complete = [e for e in told if e.status is Status.OK and e.loss is not None]

    def row(e: Evaluation) -> tuple[float, ...]:
        costs = SPACE.costs
        return e.loss or 0.0, costs.cost("params", e.mask), costs.cost("kv_bytes", e.mask)

    expected = {
        e.mask
        for e in complete
        if not any(
            row(o) != row(e) and all(a <= b for a, b in zip(row(o), row(e), strict=True))
            for o in complete
        )
    }
    assert {e.mask for e, _ in outcome.archive} == expected


@pytest.mark.parametrize("failing", [None, some_fail])
def test_cut_anywhere_and_run_again_it_is_the_same(failing: Any, tmp_path: Path) -> None:
    settings = {} if failing is None else {"failing": failing}
    plan = replace(PLAN, max_evaluations=110)
    search = Search(tmp_path / "journal.jsonl", plan, space=SPACE, **settings)
    outcome = search.run()
    expected, data = journal_of(search), search.path.read_bytes()
    lines = data.splitlines(keepends=True)
    for count in range(len(lines) + 1):
        torn = lines[count][: len(lines[count]) // 2] if count < len(lines) else b""
        search.path.write_bytes(b"".join(lines[:count]) + torn)
        assert search.run() == outcome
        assert journal_of(search) == expected
    assert not search.select.units
    assert not search.finals.units


def test_the_size_of_asks_limits_each_of_them(tmp_path: Path) -> None:
    search = Search(tmp_path / "journal.jsonl", replace(PLAN, ask=4), space=SPACE)
    assert len(search.run().front) == len(SPACE.points)
    asks = [r for r in read_journal(search.path) if r["op"] == "ask"]
    assert max(len(r["proposals"]) for r in asks) <= 4


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_the_cost_limit_holds_with_finals_for_every_budget(share: float, tmp_path: Path) -> None:
    free = Search(tmp_path / "free.jsonl", PLAN, space=SPACE).run()
    plan = replace(PLAN, max_evaluations=None, cost_tokens=share * free.cost_tokens)
    search = Search(tmp_path / "limited.jsonl", plan, space=SPACE)
    outcome = search.run()
    assert outcome.cost_tokens <= share * free.cost_tokens
    assert len(outcome.front) == len(SPACE.points)
    charged = sum(b.charged + b.preparation for b in (search.select, search.finals))
    assert outcome.cost_tokens == pytest.approx(charged, rel=1e-12)


def test_a_limit_too_low_for_the_finals_of_every_budget_is_refused() -> None:
    search = Search(Path("unused"), PLAN, space=SPACE)
    search.select = search.finals = make_backend()
    one = least(replace(SPACE, front=()), search)
    assert least(SPACE, search) == one + 2 * len(FURTHER) * search.finals.plan([SPACE.dense])


def make_backend() -> Any:
    from tests.run.synthetic import Synthetic
    from tests.searchers.landscapes import Landscape

    return Synthetic(Landscape(12))


def least(space: SearchSpace, search: Search) -> float:
    """The lowest limit that `check_cost` accepts, to a token."""
    low, high = 0, 100_000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            check_cost(
                replace(PLAN, cost_tokens=float(middle)), space, search.select, search.finals
            )
            high = middle
        except ConfigError:
            low = middle
    return high


def test_a_budget_that_nothing_met_is_left_out(tmp_path: Path) -> None:
    tight = SPACE.points[2]
    assert tight.budget == FURTHER[1]

    def failing(mask: Mask) -> Status:
        return Status.NON_FINITE if tight.fits(mask) else Status.OK

    search = Search(tmp_path / "journal.jsonl", PLAN, space=SPACE, failing=failing)
    outcome = search.run()
    assert [a.space.budget for a in outcome.front] == [
        p.budget for p in SPACE.points if p is not tight
    ]
    assert read_journal(search.path)[-2]["front"][2] == {"best": None, "baseline": None}


def test_without_a_front_finalists_are_the_best_and_the_best_baseline_first() -> None:
    space = toy(6, OWN)
    masks = (space.enumerate() or ())[:6]
    known = {m: Evaluation(m, (float(i), float(i)), 2) for i, m in enumerate(masks)}
    origins = dict.fromkeys(masks, "evolution") | {masks[4]: "window 1-2", masks[5]: "window 2-3"}
    contest = Contest(space)
    for mask in reversed(masks):
        contest.add(mask)
    found = contest.finalists(known, origins, 3)
    assert found.masks == [masks[0], masks[4], masks[1], masks[2]]
    assert found.baselines == [masks[4], masks[5]]
    assert found.needed == 2


def test_a_lead_is_the_paired_difference() -> None:
    mask = Mask.dense(2)
    ours, theirs = Evaluation(mask, (1.0, 2.0, 6.0), 3), Evaluation(mask, (2.0, 4.0, 6.0), 3)
    assert paired_lead(ours, theirs) == pytest.approx((1.0, 3**-0.5))
    assert paired_lead(Evaluation(mask, (1.0,), 1), Evaluation(mask, (2.0,), 1)) is None
