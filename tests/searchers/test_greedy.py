"""Greedy removal against a case worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from landscapes import SPACES, Landscape, SiteCosts, drive, proposals, toy

from depthsearch.searchers import build_searcher
from depthsearch.space import Budget, Evaluation, Hints, Proposal, SearchSpace, Status

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
