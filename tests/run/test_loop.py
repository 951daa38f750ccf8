from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pytest
from tests.run.synthetic import Search
from tests.searchers.landscapes import toy

from depthsearch.errors import ConfigError, JournalError, NothingFoundError
from depthsearch.evaluation import Racing
from depthsearch.journal import Journal, read_journal, without_times
from depthsearch.run.choice import choose
from depthsearch.run.loop import Outcome, Progress
from depthsearch.run.planning import Plan
from depthsearch.searchers import SEARCHERS, is_baseline, needs_sensitivity
from depthsearch.space import Budget, Evaluation, Mask, Status

METHODS = tuple(SEARCHERS)
PLANS = {
    name: Plan(name, seed=5, max_evaluations=24 if name == "optuna" else 60, finalists=3)
    for name in METHODS
}


def some_fail(mask: Mask) -> Status:
    """A fixed fifth of all masks fails, in one of the ways there are; the one-pass ones don't."""
    digest = hashlib.sha256(mask.key.encode()).digest()
    ways = (Status.NON_FINITE, Status.OUT_OF_MEMORY, Status.TIMED_OUT, Status.FAILED)
    return ways[digest[1] % 4] if digest[4] < 51 else Status.OK


def all_fail(_mask: Mask) -> Status:
    return Status.NON_FINITE


def journal_of(search: Search) -> str:
    return without_times(read_journal(search.path))


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    def test_the_journal_tells_the_whole_search(self, method: str, tmp_path: Path) -> None:
        search = Search(tmp_path / "journal.jsonl", PLANS[method])
        outcome = search.run()
        records = read_journal(search.path)
        ops = [record["op"] for record in records]
        steps = (len(ops) - 4) // 2
        assert ops == ["start", "hints", *["ask", "tell"] * steps, "finals", "end"]
        asked: list[str] = []
        for number in range(steps):
            ask, tell = records[2 + 2 * number], records[3 + 2 * number]
            assert ask["id"] == tell["id"] == number
            keys = [proposal["mask"] for proposal in ask["proposals"]]
            assert [e["mask"] for e in tell["evaluations"]] == keys
            asked += keys
            for proposal in ask["proposals"]:
                assert proposal["final"] == search.space.on_budget(Mask.from_key(proposal["mask"]))
        assert len(asked) == len(set(asked)) == outcome.evaluations
        assert search.space.on_budget(outcome.best)
        assert records[-1]["best"] == records[-2]["best"] == outcome.best.key
        assert records[-1]["cost_tokens"] == records[-2]["cost_tokens"] == outcome.cost_tokens
        costs = [record["cost_tokens"] for record in records if "cost_tokens" in record]
        assert costs == sorted(costs)

    def test_it_is_charged_for_everything_it_computed_once(
        self, method: str, tmp_path: Path
    ) -> None:
        search = Search(tmp_path / "journal.jsonl", PLANS[method])
        outcome = search.run()
        both = (search.select, search.finals)
        spent = sum(backend.charged + backend.preparation for backend in both)
        assert outcome.cost_tokens == pytest.approx(spent, rel=1e-12)
        assert set(search.select.units.values()) == {1}
        assert set(search.finals.units.values()) == {1}

    @pytest.mark.parametrize("failing", [None, some_fail])
    def test_cut_anywhere_and_run_again_it_writes_the_same_journal(
        self, method: str, failing: Any, tmp_path: Path
    ) -> None:
        settings = {} if failing is None else {"failing": failing}
        search = Search(tmp_path / "journal.jsonl", PLANS[method], **settings)
        outcome = search.run()
        computed = sum(search.select.units.values()) + sum(search.finals.units.values())
        expected, data = journal_of(search), search.path.read_bytes()
        lines = data.splitlines(keepends=True)
        boundaries = [0]
        for line in lines:
            boundaries.append(boundaries[-1] + len(line))
        # In mid-line: in the middle, and with only the line's end missing.
        torn = [
            start + offset
            for start, line in zip(boundaries, lines, strict=False)
            for offset in (len(line) // 2, len(line) - 1)
        ]
        cuts = [*boundaries, *(torn if failing is None else torn[::4])]
        if method == "optuna":
            cuts = [*boundaries[::2], *torn[::4]]
        for cut in cuts:
            search.path.write_bytes(data[:cut])
            again = search.run()
            assert journal_of(search) == expected, f"cut at byte {cut}"
            assert again == outcome
            kept = search.path.read_bytes()[: max(b for b in boundaries if b <= cut)]
            assert kept == data[: len(kept)], "old records must not change"
            repeated = sum(search.select.units.values()) + sum(search.finals.units.values())
            assert repeated <= computed
            if cut == len(data):
                assert repeated == 0, "a finished search computes nothing"

    def test_the_cost_limit_holds(self, method: str, tmp_path: Path) -> None:
        plan = replace(PLANS[method], max_evaluations=None)
        if method in ("random", "evolution", "optuna"):
            plan = replace(plan, max_evaluations=40)
        free = Search(tmp_path / "free.jsonl", plan).run()
        reached = 0
        for place, share in enumerate((0.3, 0.5, 0.8, 0.95, 1.5)):
            limit = share * free.cost_tokens
            search = Search(tmp_path / f"{place}.jsonl", replace(plan, cost_tokens=limit))
            try:
                outcome = search.run()
            except NothingFoundError:
                costs = [r.get("cost_tokens", 0) for r in read_journal(search.path)]
            else:
                reached += 1
                costs = [outcome.cost_tokens]
                if share < 1 and outcome.evaluations < free.evaluations:
                    assert outcome.reason == "budget"
            # The first pass over the text is paid even where nothing is left after it.
            least = search.select.preparation + search.select.hints()[1]
            if needs_sensitivity(method):
                least += search.select.sensitivity()[1]
            assert max(costs) <= max(limit, least)
        assert reached >= 1

    def test_the_limit_on_evaluations_holds(self, method: str, tmp_path: Path) -> None:
        for limit in (1, 7, 20):
            for ask in (None, 3):
                plan = replace(PLANS[method], max_evaluations=limit, ask=ask)
                search = Search(tmp_path / f"{limit}-{ask}.jsonl", plan)
                try:
                    assert search.run().evaluations <= limit
                except NothingFoundError:
                    assert method in ("greedy", "beam", "single_removal", "additive")
                assert len({mask for _, mask in search.select.units}) <= limit
                if ask is not None:
                    asks = [r for r in read_journal(search.path) if r["op"] == "ask"]
                    assert max(len(r["proposals"]) for r in asks) <= ask

    def test_failures_are_survived(self, method: str, tmp_path: Path) -> None:
        search = Search(tmp_path / "journal.jsonl", PLANS[method], failing=some_fail)
        outcome = search.run()
        assert some_fail(outcome.best) is Status.OK
        assert outcome.search.status is outcome.finals.status is Status.OK

    def test_when_everything_fails_it_says_so(self, method: str, tmp_path: Path) -> None:
        search = Search(tmp_path / "journal.jsonl", PLANS[method], failing=all_fail)
        with pytest.raises(NothingFoundError, match=r"none of \d+ evaluated masks"):
            search.run()
        before = journal_of(search)
        with pytest.raises(NothingFoundError):
            search.run()
        assert journal_of(search) == before

    def test_another_seed_is_another_start_record_away(self, method: str, tmp_path: Path) -> None:
        first = Search(tmp_path / "first.jsonl", PLANS[method])
        again = Search(tmp_path / "again.jsonl", PLANS[method])
        assert first.run() == again.run()
        assert journal_of(first) == journal_of(again)


class TestDivergence:
    @pytest.fixture
    def search(self, tmp_path: Path) -> Search:
        search = Search(
            tmp_path / "journal.jsonl",
            PLANS["evolution"],
            start={"version": "1", "signature": {"model": {"fingerprint": "a"}, "threads": 2}},
        )
        search.run()
        return search

    def refused(self, search: Search, message: str) -> None:
        before = search.path.read_bytes()
        with pytest.raises(JournalError, match=message):
            search.run()
        assert search.path.read_bytes() == before
        assert not search.select.units

    def test_another_version(self, search: Search) -> None:
        search.start = {**search.start, "version": "2"}
        self.refused(search, r"written by depthsearch 1, this is 2: resume it with that version")

    def test_another_model(self, search: Search) -> None:
        search.start = {**search.start, "signature": {"model": {"fingerprint": "b"}, "threads": 2}}
        self.refused(
            search, r"record 1: .*differ in 'signature\.model\.fingerprint', a before and b now"
        )

    def test_another_number_of_threads(self, search: Search) -> None:
        search.start = {**search.start, "signature": {"model": {"fingerprint": "a"}, "threads": 1}}
        self.refused(search, r"'signature\.threads', 2 before and 1 now")

    def test_a_part_that_is_new(self, search: Search) -> None:
        search.start = {**search.start, "config": {"search": {}}}
        self.refused(search, r"differ in 'config'")

    def test_another_seed_of_the_searcher(self, search: Search) -> None:
        search.plan = replace(search.plan, seed=6)
        self.refused(search, r"another 'ask' record .*differ in 'proposals'")

    def test_another_space(self, search: Search) -> None:
        search.space = toy(6, Budget("params", ratio=0.6, of="blocks"))
        self.refused(search, r"another 'ask' record")

    def test_racing_switched_off(self, search: Search) -> None:
        search.plan = replace(search.plan, racing=False)
        self.refused(search, r"differ in 'survivors'")

    def test_a_record_of_another_kind(self, search: Search) -> None:
        lines = search.path.read_bytes().splitlines(keepends=True)
        search.path.write_bytes(b"".join([*lines[:1], *lines[2:]]))
        self.refused(search, r"another 'hints' record than the journal's 'ask'")

    def test_losses_that_were_changed_lead_elsewhere(self, search: Search) -> None:
        records = read_journal(search.path)
        for evaluation in records[3]["evaluations"]:
            evaluation["losses"] = [-x for x in evaluation["losses"]]
        search.path.write_text("".join(json.dumps(record) + "\n" for record in records))
        self.refused(search, "another '(ask|finals|end)' record")


@pytest.mark.parametrize("method", ["surrogate", "random", "mcts", "beam", "greedy"])
@pytest.mark.parametrize("patience", [1, 7, 30])
def test_patience_ends_a_search_that_finds_nothing_better(
    method: str, patience: int, tmp_path: Path
) -> None:
    plan = Plan(method, seed=5, max_evaluations=150, ask=5, finalists=3)
    long = Search(tmp_path / "long.jsonl", plan)
    long.run()
    short = Search(tmp_path / "short.jsonl", replace(plan, patience=patience))
    outcome = short.run()
    steps, ended = asks_until(long, patience)
    assert (outcome.reason == "patience") == ended
    assert sum(record["op"] == "ask" for record in read_journal(short.path)) == steps
    expected = journal_of(short)
    assert short.run() == outcome
    assert journal_of(short) == expected


def asks_until(search: Search, patience: int) -> tuple[int, bool]:
    """After how many asks of a search so many final masks in a row were no better; and whether."""
    final: set[str] = set()
    best: float | None = None
    vain = asks = 0
    for record in read_journal(search.path):
        if record["op"] == "ask":
            final |= {p["mask"] for p in record["proposals"] if p["final"]}
        elif record["op"] == "tell":
            asks += 1
            for e in record["evaluations"]:
                if e["mask"] not in final:
                    continue
                if e["status"] == "ok" and (best is None or e["loss"] < best):
                    best, vain = e["loss"], 0
                elif best is not None:
                    vain += 1
            if vain >= patience:
                return asks, True
    return asks, False


def test_patience_counts_what_is_better_at_any_budget(tmp_path: Path) -> None:
    space = toy(10)
    front = replace(space, front=(Budget("params", 0.9), Budget("params", 0.6)))
    for patience in (1, 20):
        plan = Plan("front", seed=5, max_evaluations=150, ask=4, patience=patience)
        search = Search(tmp_path / f"{patience}.jsonl", plan, space=front)
        assert search.run().reason == "patience"
        best: dict[Budget, float] = {}
        vain = 0
        tells = [r for r in read_journal(search.path) if r["op"] == "tell"]
        for record in tells:
            assert vain < patience
            for e in map(Evaluation.from_json, record["evaluations"]):
                met = [at for at in front.points if at.fits(e.mask)]
                if not met or not front.meets(e.mask):
                    continue
                better = [
                    at.budget
                    for at in met
                    if e.status is Status.OK and e.loss is not None
                    and e.loss < best.get(at.budget, float("inf"))
                ]  # fmt: skip
                best |= dict.fromkeys(better, e.loss or 0.0)
                vain = 0 if better or len(best) < 3 else vain + 1
        assert vain >= patience


def test_racing_saves_and_can_be_switched_off(tmp_path: Path) -> None:
    plan = replace(PLANS["windows"], max_evaluations=None)
    raced = Search(tmp_path / "raced.jsonl", plan, space=toy(12))
    whole = Search(tmp_path / "whole.jsonl", replace(plan, racing=False), space=toy(12))
    first, second = raced.run(), whole.run()
    assert first.best == second.best
    assert first.cost_tokens < second.cost_tokens
    statuses = {
        run.path.stem: {
            e["status"] for r in read_journal(run.path) if r["op"] == "tell"
            for e in r["evaluations"]
        }
        for run in (raced, whole)
    }  # fmt: skip
    assert statuses == {"raced": {"ok", "eliminated"}, "whole": {"ok"}}


@pytest.mark.parametrize(
    ("method", "racing", "cut"),
    [
        ("evolution", Racing(), True),
        ("evolution", False, False),
        ("surrogate", False, False),
        ("evopress", False, True),
    ],
)
def test_without_races_only_a_search_that_is_defined_by_its_cuts_makes_them(
    method: str, racing: Racing | Literal[False], cut: bool, tmp_path: Path
) -> None:
    search = Search(
        tmp_path / "journal.jsonl", replace(PLANS[method], racing=racing), space=toy(12)
    )
    search.run()
    records = read_journal(search.path)
    assert any("stages" in record for record in records) == cut
    told = [e for record in records if record["op"] == "tell" for e in record["evaluations"]]
    assert any(e["status"] == "eliminated" for e in told) == cut


@pytest.mark.parametrize("method", ["evolution", "surrogate"])
def test_halving_takes_the_place_of_the_cuts_that_a_raced_search_makes_itself(
    method: str, tmp_path: Path
) -> None:
    plan = replace(PLANS[method], racing=Racing("halving"))
    search = Search(tmp_path / "journal.jsonl", plan, space=toy(12))
    search.run()
    asks = [r for r in read_journal(search.path) if r["op"] == "ask" and "stages" in r]
    assert asks
    assert {stage["share"] for ask in asks for stage in ask["stages"]} == {0.5}


def test_halving_stops_at_its_rungs_and_is_resumed(tmp_path: Path) -> None:
    """One ask of windows: ten sequences leave room for one rung, after half of the text."""
    plan = replace(PLANS["windows"], max_evaluations=None, racing=Racing("halving"))
    search = Search(tmp_path / "halved.jsonl", plan, space=toy(12))
    search.run()
    records = read_journal(search.path)
    ask = next(record for record in records if record["op"] == "ask")
    tell = next(record for record in records if record["op"] == "tell")
    count = len(ask["proposals"])
    assert ask["survivors"] is None
    assert ask["stages"] == [{"share": 0.5, "survivors": max(4, -(-count // 2))}]
    judged = sorted(len(e["losses"]) for e in tell["evaluations"])
    assert judged == [6] * (count // 2) + [10] * (count - count // 2)
    kept = {e["mask"] for e in tell["evaluations"] if e["status"] == "ok"}
    firsts = sorted(tell["evaluations"], key=lambda e: sum(e["losses"][:6]))
    assert kept == {e["mask"] for e in firsts[: len(kept)]}

    whole = search.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    search.path.write_bytes(b"".join(lines[:3]))
    search.run()
    again = read_journal(search.path)
    assert without_times(again) == without_times(records)
    search.plan = replace(plan, racing=Racing("halving", eta=5))
    with pytest.raises(JournalError, match="stages"):
        search.run()


def test_a_cost_limit_counts_on_what_halving_saves(tmp_path: Path) -> None:
    plan = replace(PLANS["random"], max_evaluations=None, cost_tokens=6000.0)
    counts = {}
    for name, racing in (("none", False), ("halving", Racing("halving"))):
        search = Search(tmp_path / name, replace(plan, racing=racing), space=toy(12))
        outcome = search.run()
        assert outcome.cost_tokens <= 6000.0
        counts[name] = outcome.evaluations
    assert counts["halving"] > counts["none"]


@pytest.mark.parametrize("method", ["evolution", "surrogate", "mcts"])
@pytest.mark.parametrize("limit", [16_000.0, 20_000.0])
def test_no_more_is_kept_for_dear_finals_than_they_may_cost(
    method: str, limit: float, tmp_path: Path
) -> None:
    plan = replace(PLANS[method], finalists=1, max_evaluations=None, cost_tokens=limit)
    search = Search(tmp_path / "journal.jsonl", plan, space=toy(12), behind=100.0)
    outcome = search.run()
    assert outcome.cost_tokens <= limit
    tells = [r["cost_tokens"] for r in read_journal(search.path) if r["op"] == "tell"]
    dearest = max(search.finals.plan([mask]) for mask in search.space.windows())
    baseline = search.finals.plan([outcome.baseline or outcome.best])
    ask = max(after - before for before, after in pairwise(tells))
    assert 2 * baseline < dearest
    assert limit - tells[-1] <= search.finals.preparation + dearest + baseline + ask


def test_finalists_are_the_best_and_the_best_baseline(tmp_path: Path) -> None:
    for finalists in (1, 4):
        plan = replace(PLANS["evolution"], finalists=finalists, max_evaluations=150)
        search = Search(tmp_path / f"{finalists}.jsonl", plan)
        outcome = search.run()
        known: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for record in read_journal(search.path):
            if record["op"] == "ask":
                final = {p["mask"] for p in record["proposals"] if p["final"]}
                origins |= {p["mask"]: p["origin"] for p in record["proposals"]}
            elif record["op"] == "tell":
                known |= {
                    e["mask"]: Evaluation.from_json(e)
                    for e in record["evaluations"]
                    if e["mask"] in final and e["status"] == "ok"
                }
        finals = next(r for r in read_journal(search.path) if r["op"] == "finals")
        masks = [e["mask"] for e in finals["evaluations"]]
        ranked = sorted(known, key=lambda mask: known[mask].order)
        baseline = next(mask for mask in ranked if is_baseline(origins[mask]))
        assert masks[0] == ranked[0]
        assert set(masks) == {*ranked[:finalists], baseline}
        assert finals["baselines"] == [m for m in masks if is_baseline(origins[m])]
        assert outcome.baseline == Mask.from_key(finals["baselines"][0])
        assert outcome.origin == origins[outcome.best.key]
        fresh = {e["mask"]: e["loss"] for e in finals["evaluations"]}
        assert fresh[outcome.best.key] <= min(fresh[mask] for mask in finals["baselines"])
        assert outcome.finals.loss == fresh[outcome.best.key]
        assert outcome.finals.losses != outcome.search.losses


def test_finalists_are_thinned_out_on_fresh_text(tmp_path: Path) -> None:
    plan = replace(PLANS["random"], finalists=40, max_evaluations=60)
    hardly = Racing(error_rate=1e-9)
    for racing, judged in ((hardly, {4: 20, 6: 10, 10: 10}), (False, {10: 40})):
        search = Search(tmp_path / f"{racing}.jsonl", replace(plan, racing=racing), space=toy(12))
        outcome = search.run()
        found = finals_of(search.path)
        assert Counter(len(e.losses) for e in found) == judged
        complete = [e for e in found if e.status is Status.OK]
        assert {len(e.losses) for e in complete} == {10}
        assert outcome.finals == min(complete, key=lambda e: e.order)


def test_the_best_mask_and_the_best_baseline_are_judged_on_all_fresh_text(tmp_path: Path) -> None:
    plan = replace(PLANS["evolution"], finalists=20, max_evaluations=300)
    search = Search(tmp_path / "journal.jsonl", plan, space=toy(12))
    outcome = search.run()
    found = finals_of(search.path)
    complete = [e.mask for e in found if e.status is Status.OK]
    assert outcome.baseline is not None
    safe = {found[0].mask, outcome.baseline}
    assert safe <= set(complete)
    assert len(complete) == len(safe) + 4 < len(found)


def finals_of(journal: Path) -> list[Evaluation]:
    record = next(r for r in read_journal(journal) if r["op"] == "finals")
    return [Evaluation.from_json(e) for e in record["evaluations"]]


def test_progress_is_a_fraction_that_ends_at_one(tmp_path: Path) -> None:
    limits: list[dict[str, Any]] = [
        {"method": "greedy"},
        {"method": "evolution", "max_evaluations": 80},
        {"method": "evolution", "cost_tokens": 6000.0, "max_evaluations": 500},
    ]
    for place, limit in enumerate(limits):
        seen: list[Progress] = []
        plan = Plan(**limit)
        search = Search(tmp_path / f"{place}.jsonl", plan, on_progress=seen.append)
        outcome = search.run()
        for phase in ("search", "finals"):
            fractions = [p.fraction for p in seen if p.phase == phase and p.fraction is not None]
            assert fractions == sorted(fractions)
            assert all(0 <= fraction <= 1 for fraction in fractions)
            assert len(fractions) >= 5
        assert [p.phase for p in seen].index("finals") > 0
        assert (seen[-1].phase, seen[-1].fraction) == ("done", 1.0)
        assert seen[-1].cost_tokens == outcome.cost_tokens
        assert seen[-1].evaluations == outcome.evaluations
        best = [p.best_loss for p in seen if p.best_loss is not None]
        assert best == sorted(best, reverse=True)
        replayed: list[Progress] = []
        search.on_progress = replayed.append
        search.run()
        assert replayed[-1] == seen[-1]


def test_nobody_knows_how_far_a_search_is_that_patience_ends(tmp_path: Path) -> None:
    seen: list[Progress] = []
    plan = Plan("evolution", patience=40)
    Search(tmp_path / "journal.jsonl", plan, on_progress=seen.append).run()
    shares = {phase: [p.fraction for p in seen if p.phase == phase] for phase in ("search", "done")}
    assert set(shares["search"]) == {None}
    assert shares["done"] == [1.0]
    assert all(p.fraction is not None for p in seen if p.phase == "finals")


def evaluation(key: str, losses: list[float], status: Status = Status.OK) -> Evaluation:
    return Evaluation(Mask.from_key(key), tuple(losses), len(losses), status)


class TestChoose:
    """Losses of the baseline and of a challenger on the same fresh sequences."""

    base = evaluation("0011", [1.0, 2.0, 3.0, 4.0])

    def chosen(self, *others: Evaluation, baselines: tuple[str, ...] = ("0011",)) -> str:
        masks = [Mask.from_key(key) for key in baselines]
        finals = (self.base, *others)
        found = {choose(order, masks).mask.key for order in (finals, finals[::-1])}
        assert len(found) == 1, "the order of finalists must not matter"
        return found.pop()

    def test_a_challenger_that_is_clearly_better_wins(self) -> None:
        assert self.chosen(evaluation("1001", [0.9, 1.9, 2.9, 3.8])) == "1001"

    def test_noise_never_replaces_a_baseline(self) -> None:
        """Better by 0.05 on average, with a standard error of the difference above that."""
        assert self.chosen(evaluation("1001", [1.4, 1.5, 3.4, 3.5])) == "0011"

    @pytest.mark.parametrize("others", [1, 5, 15])
    def test_of_many_that_are_no_better_one_seldom_replaces_the_baseline(self, others: int) -> None:
        rng = np.random.default_rng(0)
        replaced = 0
        for _ in range(400):
            text = rng.normal(1.0, 0.3, size=16)
            finals = [
                evaluation(f"{key:05b}", list(text + 0.05 * rng.standard_normal(16)))
                for key in range(others + 1)
            ]
            replaced += choose(finals, [finals[0].mask]) != finals[0]
        assert 0.02 < replaced / 400 < 1 / 6 + 0.03

    def test_exactly_one_standard_error_is_not_enough(self) -> None:
        # Differences -2, 0, -2, 0, ...: mean -1; with two sequences the standard error is 1.
        base = evaluation("0011", [2.0, 2.0])
        other = evaluation("1001", [0.0, 2.0])
        assert choose([base, other], [base.mask]) == base

    def test_a_large_spread_all_sequences_share_does_not_hide_a_difference(self) -> None:
        assert self.chosen(evaluation("1001", [x - 0.01 for x in self.base.losses])) == "1001"

    def test_a_challenger_that_is_worse_or_equal_loses(self) -> None:
        assert self.chosen(evaluation("1001", [1.1, 2.1, 3.1, 4.1])) == "0011"
        assert self.chosen(evaluation("1001", list(self.base.losses))) == "0011"
        assert self.chosen(evaluation("0001", list(self.base.losses))) == "0011"

    def test_only_the_best_baseline_has_to_be_beaten(self) -> None:
        worse = evaluation("0101", [9.0, 9.0, 9.0, 9.0])
        better = evaluation("1001", [1.4, 1.5, 3.4, 3.5])
        assert self.chosen(worse, better, baselines=("0011", "0101")) == "0011"
        assert self.chosen(worse, baselines=("0101",)) == "0011"

    def test_without_a_baseline_the_lowest_loss_wins(self) -> None:
        better = evaluation("1001", [1.4, 1.5, 3.4, 3.5])
        assert self.chosen(better, baselines=()) == "1001"

    def test_a_single_sequence_proves_nothing(self) -> None:
        base, other = evaluation("0011", [1.0]), evaluation("1001", [0.5])
        assert choose([base, other], [base.mask]) == base
        assert choose([base, other], []) == other

    def test_a_baseline_that_failed_on_fresh_data_does_not_count(self) -> None:
        failed = evaluation("0011", [], Status.NON_FINITE)
        other = evaluation("1001", [5.0, 6.0])
        assert choose([failed, other], [failed.mask]) == other

    def test_when_all_failed_it_says_so(self) -> None:
        failed = evaluation("0011", [], Status.OUT_OF_MEMORY)
        with pytest.raises(NothingFoundError, match=r"all 1 finalists failed .*out_of_memory"):
            choose([failed], [])


def test_finals_that_all_fail_can_be_tried_again(tmp_path: Path) -> None:
    """Nothing is written down about finals that came to nothing."""
    search = Search(tmp_path / "journal.jsonl", PLANS["windows"])
    first: Outcome = search.run()
    expected = journal_of(search)
    lines = search.path.read_bytes().splitlines(keepends=True)
    search.path.write_bytes(b"".join(lines[:-2]))
    search.failing = all_fail  # only the finals are computed again
    with pytest.raises(NothingFoundError, match="finalists failed"):
        search.run()
    search.failing = lambda _: Status.OK
    assert search.run() == first
    assert journal_of(search) == expected


class TestManyFailures:
    """A search in which masks only fail ends long before its limits."""

    plan = Plan("random", max_evaluations=1000)
    space = toy(10)

    def test_it_says_so_where_nothing_was_found(self, tmp_path: Path) -> None:
        path = tmp_path / "journal.jsonl"
        search = Search(path, self.plan, space=self.space, failing=all_fail)
        with pytest.raises(NothingFoundError, match=r"last \d+ masks all failed \(non_finite\)"):
            search.run()
        assert 100 <= len({mask for _, mask in search.select.units}) < 200

    def test_it_keeps_what_was_found_before(self, tmp_path: Path) -> None:
        good: set[Mask] = set()

        def failing_later(mask: Mask) -> Status:
            if len(good) < 20:
                good.add(mask)
            return Status.OK if mask in good else Status.OUT_OF_MEMORY

        path = tmp_path / "journal.jsonl"
        search = Search(path, self.plan, space=self.space, failing=failing_later)
        outcome = search.run()
        assert outcome.best in good
        assert outcome.reason == "failures"
        assert 100 <= outcome.evaluations < 200
        assert read_journal(path)[-1]["reason"] == "failures"


class KilledError(Exception):
    """Stands for the end of a process at a certain write."""


@pytest.mark.parametrize("record", [3, 4, 6, 8])
def test_a_search_with_its_own_storage_is_resumed(
    tmp_path: Path, record: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the killed process left in the study is built up again, nothing in it twice."""
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    plan = Plan("optuna", seed=5, max_evaluations=12, finalists=2, options={"storage": storage})
    in_memory = Search(tmp_path / "memory.jsonl", replace(plan, options={}))
    outcome = in_memory.run()
    search = Search(tmp_path / "journal.jsonl", plan)
    append, written = Journal.append, 0

    def dying(journal: Journal, entry: Any) -> Any:
        nonlocal written
        written += 1
        if written == record:
            raise KilledError
        return append(journal, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", dying)
        with pytest.raises(KilledError):
            search.run()
    assert search.run() == outcome
    assert journal_of(search) == journal_of(in_memory)
    (summary,) = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(study_name=summary.study_name, storage=storage)
    done = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert len({trial.user_attrs["mask"] for trial in done}) == outcome.evaluations


def test_resuming_a_run_leaves_the_study_of_another_alone(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    plan = Plan("optuna", seed=5, max_evaluations=12, finalists=2, options={"storage": storage})
    first = Search(tmp_path / "first.jsonl", plan)
    outcome = first.run()
    fresh = {"storage": storage, "fresh": True}
    Search(tmp_path / "second.jsonl", replace(plan, seed=6, options=fresh)).run()

    def trials() -> list[optuna.trial.FrozenTrial]:
        return optuna.load_study(study_name="depthsearch", storage=storage).trials

    of_second = trials()
    whole = first.path.read_bytes()
    assert first.run() == outcome
    assert first.path.read_bytes() == whole
    assert trials() == of_second
    # The first run as if it had been killed before the second one took its study.
    killed = b"".join(whole.splitlines(keepends=True)[:6])
    first.path.write_bytes(killed)
    for options in (plan.options, fresh):
        with pytest.raises(ConfigError, match="not this run's any more: give another 'storage'"):
            replace(first, plan=replace(plan, options=options)).run()
    assert first.path.read_bytes() == killed
    assert trials() == of_second
    optuna.delete_study(study_name="depthsearch", storage=storage)
    assert first.run() == outcome
    keys = {trial.user_attrs["mask"] for trial in trials()}
    assert keys != {trial.user_attrs["mask"] for trial in of_second}
    assert len(keys) >= outcome.evaluations
