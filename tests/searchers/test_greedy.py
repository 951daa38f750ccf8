"""Greedy removal against a case worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from landscapes import (
    SPACES,
    Landscape,
    SiteCosts,
    best_final,
    digest,
    drive,
    proposals,
    toy,
    unreliable,
)

from depthsearch.searchers import build_searcher
from depthsearch.searchers.greedy import can_race, ranking
from depthsearch.space import Budget, Evaluation, Hints, Mask, Proposal, SearchSpace, Status

# Two blocks, attention costs 1 and FFN 3: 8 in all, of which the budget keeps 4.
SPACE = toy(2, Budget("params", ratio=0.5, of="blocks"))
INCREASE = {0: 0.3, 1: 0.6, 2: 0.2, 3: 0.5}
FLAT = Hints(((1.0,) * 5,) * 5, ((0.0,) * 5,) * 5)


def additive(proposal: Proposal, failing: Mapping[str, Status] | None = None) -> Evaluation:
    status = (failing or {}).get(proposal.mask.key, Status.OK)
    loss = 1.0 + sum(INCREASE[i] for i in proposal.mask.dropped)
    return Evaluation(proposal.mask, (loss,) if status.has_loss else (), 1, status)


def asked(rule: str, failing: Mapping[str, Status] | None = None) -> list[list[str]]:
    searcher = build_searcher("greedy", SPACE, FLAT, np.random.default_rng(0), {"rule": rule})
    record = drive(searcher, lambda p: additive(p, failing))
    return [[proposal.mask.key for proposal in batch.proposals] for batch, _ in record]


SINGLES = ["0111", "1011", "1101", "1110"]


def test_plain_rule_takes_the_lowest_loss() -> None:
    # The second attention first (0.2), then the first one (0.5 beats 0.7 and 0.8); what is left
    # then are FFNs, after which one attention fits again, and both such masks are known already.
    assert asked("plain") == [SINGLES, ["0101", "1001", "1100"]]


def test_cost_aware_rule_takes_the_lowest_loss_per_cost_freed() -> None:
    # Prices 0.3, 0.2, 0.2 and 0.167: the second FFN goes first. Then 1 is left to free, so that
    # the first FFN costs 0.6 for it and the second attention, at 0.2, ends the search.
    assert asked("cost_aware") == [["1111"], SINGLES, ["0110", "1010", "1100"]]


def test_failed_candidates_are_passed_over() -> None:
    failing = {"1110": Status.NON_FINITE, "1101": Status.FAILED}
    # Without both, the first FFN (0.2 per unit) leads.
    assert asked("cost_aware", failing)[2] == ["0011", "1001", "1010"]


def test_a_step_in_which_all_fail_ends_the_search() -> None:
    assert asked("plain", dict.fromkeys(SINGLES, Status.FAILED)) == [SINGLES]


def test_complete_losses_go_before_partial_ones() -> None:
    # The second attention looks best, but its loss is partial.
    assert asked("plain", {"1101": Status.ELIMINATED})[1] == ["0011", "0101", "0110"]


@pytest.mark.parametrize(
    ("name", "rule", "survivors"),
    [
        ("sublayer", "cost_aware", None),
        ("sublayer", "plain", 1),
        ("drop_sites", "cost_aware", 1),
        ("attention_kv", "cost_aware", 1),
    ],
)
def test_a_step_is_raced_only_where_losses_alone_decide(
    name: str, rule: str, survivors: int | None
) -> None:
    space = SPACES[name]
    landscape = Landscape(len(space.sites))
    searcher = build_searcher(
        "greedy", space, landscape.hints(), np.random.default_rng(0), {"rule": rule}
    )
    record = drive(searcher, lambda p: landscape.evaluate(p.mask))
    steps = [batch for batch, _ in record if "dense" not in batch.proposals[0].origin]
    assert steps[0].survivors == survivors


def test_masks_that_meet_the_budget_do_not_race_with_larger_ones() -> None:
    searcher = build_searcher("greedy", SPACE, FLAT, np.random.default_rng(0), {"rule": "plain"})
    (first, _), (second, _) = drive(searcher, additive)
    assert first.survivors == 1
    # Without the second attention an FFN ends the search, which the first attention does not.
    assert [p.final for p in second.proposals] == [False, True, True]
    assert second.survivors is None


def test_a_race_is_on_one_side_of_the_budget_rivals_included() -> None:
    larger, smaller = Mask.from_key("0101"), Mask.from_key("1001")
    assert can_race(SPACE, "plain", {larger: 1})
    assert can_race(SPACE, "plain", {smaller: 3, Mask.from_key("1100"): 3}, [smaller])
    assert not can_race(SPACE, "plain", {larger: 1, smaller: 3})
    assert not can_race(SPACE, "plain", {smaller: 3}, [larger])
    assert not can_race(SPACE, "cost_aware", {larger: 1, SPACE.dense: 0})


@pytest.mark.parametrize("before", [None, Evaluation(SPACE.dense, (0.1, 0.1, 2.9, 2.9), 4)])
def test_partial_losses_are_ranked_on_the_sequences_they_share(before: Evaluation | None) -> None:
    failed, worst, better = (Mask.from_key(key) for key in SINGLES[:3])
    answers = {
        failed: Evaluation(failed, (), 0, Status.NON_FINITE),
        worst: Evaluation(worst, (0.9,), 1, Status.ELIMINATED),
        better: Evaluation(better, (0.2, 0.2, 3.0), 3, Status.ELIMINATED),
    }
    assert ranking("plain", answers, dict.fromkeys(answers, 1), before) == [better, worst]
    assert ranking("cost_aware", answers, dict.fromkeys(answers, 1), before) == [better, worst]


def test_ends_on_budget_on_a_large_packable_space() -> None:
    space = toy(30, packable=True, protected=(0, 1, 2, 59))
    landscape = Landscape(60)
    searcher = build_searcher("greedy", space, landscape.hints(), np.random.default_rng(0), {})
    record = drive(searcher, lambda p: landscape.evaluate(p.mask))
    last = proposals(record)[-1]
    assert last.final
    assert space.on_budget(last.mask)


def test_sites_that_free_nothing_alone_are_ranked_by_their_loss() -> None:
    space = toy(4, Budget("kv_bytes", ratio=0.5), "attention")
    shared = SiteCosts(0, (0,) * 8, (((0, 2), 2), ((4, 6), 2)))
    space = SearchSpace(space.sites, type(space.costs)({"kv_bytes": shared}), space.budget)
    landscape = Landscape(8)
    searcher = build_searcher("greedy", space, landscape.hints(), np.random.default_rng(0), {})
    record = drive(searcher, lambda p: landscape.evaluate(p.mask))
    assert space.on_budget(proposals(record)[-1].mask)


@pytest.mark.parametrize(
    ("name", "rule", "expected"),
    [
        (
            "sublayer",
            "cost_aware",
            "0c46d1bb16ee2468c43c6584922c83fe1b6f0fc8275872d3c88a996694a9b6ec",
        ),
        ("sublayer", "plain", "484c30e307de133c09333554cb01a57d7a63569c2f25be825bd106419329d205"),
        (
            "packable",
            "cost_aware",
            "089434eac13c0bc35a2aabce85cd22118d4394466c44f3076904e1d838d4e67e",
        ),
    ],
)
def test_journals_from_before_there_were_exchanges_replay(
    name: str, rule: str, expected: str
) -> None:
    space = SPACES[name]
    landscape = Landscape(len(space.sites), 3)
    options = {"rule": rule, "exchange": 0}
    searcher = build_searcher("greedy", space, landscape.hints(), np.random.default_rng(0), options)
    record = drive(searcher, unreliable(landscape, 0.2))
    assert digest([proposal.mask for proposal in proposals(record)]) == expected


# Site 1 is the cheapest to lose, but the best two are 3 and 5, which go better together.
TWO = toy(3, Budget("sites", drop=2))
ALONE = {0: 0.5, 1: 0.1, 2: 0.6, 3: 0.2, 4: 0.7, 5: 0.25}
NO_HINT = Hints(((1.0,) * 7,) * 7, ((0.0,) * 7,) * 7)
BEST = Mask.dropping(6, [3, 5])


def misleading(proposal: Proposal, best: Status = Status.OK) -> Evaluation:
    gone = proposal.mask.dropped
    loss = 1.0 + sum(ALONE[i] for i in gone) + 0.3 * (len(gone) > 1)
    if proposal.mask == BEST:
        loss, status = 1.35, best
    else:
        status = Status.OK
    return Evaluation(proposal.mask, (loss,) if status.has_loss else (), 1, status)


def exchanged(candidates: int, best: Status = Status.OK) -> list[tuple[str, list[tuple[int, ...]]]]:
    """Origins and dropped sites of what is asked after the steps."""
    options = {"exchange": 2, "exchange_candidates": candidates}
    searcher = build_searcher("greedy", TWO, NO_HINT, np.random.default_rng(0), options)
    record = drive(searcher, lambda p: misleading(p, best))
    assert [len(batch.proposals) for batch, _ in record][:3] == [1, 6, 5]
    for batch, _ in record[3:]:
        assert batch.survivors == 1
        assert len(batch.rivals) == 1
    return [
        (batch.proposals[0].origin, [p.mask.dropped for p in batch.proposals])
        for batch, _ in record[3:]
    ]


def test_an_exchange_puts_back_what_was_dropped_first() -> None:
    # The first step's exchanges are its own candidates, so there is nothing to ask. After the
    # second one 1 and 3 are gone. To put back 3 is known to be worse. To put back 1 leaves 3 with
    # 5, 0, 2 or 4, in the order of what their removals cost last. From 3 and 5 on, 3 may go back.
    first, second = exchanged(16)
    assert first == ("greedy exchange 2", [(3, 5), (0, 3), (2, 3), (3, 4)])
    assert second == ("greedy exchange 2", [(0, 5), (2, 5), (4, 5)])


def test_the_most_promising_exchanges_are_tried_first() -> None:
    # Then 5 cost more than 3 when last measured (0.55 and 0.5), so it is put back, for 0.
    assert [masks for _, masks in exchanged(1)] == [[(3, 5)], [(0, 3)]]


@pytest.mark.parametrize("status", [Status.ELIMINATED, Status.NON_FINITE])
def test_only_a_complete_loss_is_exchanged_for(status: Status) -> None:
    # Nothing is better then, so that there is no second round.
    assert [masks for _, masks in exchanged(1, status)] == [[(3, 5)]]


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("rule", ["cost_aware", "plain"])
def test_exchanges_free_no_less_and_lower_the_loss(name: str, rule: str) -> None:
    space = SPACES[name]
    landscape = Landscape(len(space.sites), 5)
    options = {"rule": rule, "exchange": 3, "exchange_candidates": 6}
    searcher = build_searcher("greedy", space, landscape.hints(), np.random.default_rng(0), options)
    held: Evaluation | None = None
    for batch, evaluations in drive(searcher, lambda p: landscape.evaluate(p.mask)):
        if "exchange" not in batch.proposals[0].origin:
            held = None
            continue
        assert len(evaluations) <= 6
        if batch.survivors is not None:
            # Raced against the mask that is to be exchanged.
            (rival,) = batch.rivals
            assert all(
                space.cost(p.mask) <= max(space.cap, space.cost(rival)) for p in batch.proposals
            )
            current = landscape.evaluate(rival)
            assert held is None or current == held
            better = min(evaluations, key=lambda e: e.order)
            assert current.loss is not None
            assert better.loss is not None
            held = better if rule == "plain" and better.loss < current.loss else None


@pytest.mark.parametrize(
    ("space", "times"),
    [
        (toy(12, Budget("sites", drop=8)), 2.0),
        (toy(12, packable=True), 1.7),
        (toy(10), 2.0),
    ],
    ids=["sites", "packable", "params"],
)
def test_exchanges_end_lower_than_greedy_on_average(space: SearchSpace, times: float) -> None:
    """For at most `times` greedy's evaluations, over eight landscapes."""
    found = {
        exchange: [run_on(space, {"exchange": exchange}, seed) for seed in range(8)]
        for exchange in (0, 3)
    }
    losses = {exchange: np.mean([loss for loss, _ in runs]) for exchange, runs in found.items()}
    counts = {exchange: sum(count for _, count in runs) for exchange, runs in found.items()}
    assert losses[3] < losses[0]
    assert counts[3] <= times * counts[0]


def run_on(space: SearchSpace, options: dict[str, object], seed: int) -> tuple[float, int]:
    """The best loss on a landscape and the number of evaluations."""
    landscape = Landscape(len(space.sites), seed)
    searcher = build_searcher("greedy", space, landscape.hints(), np.random.default_rng(0), options)
    record = drive(searcher, lambda p: landscape.evaluate(p.mask))
    return best_final(record).loss or 0.0, len(proposals(record))
