"""Beam search against greedy removal, a case worked out by hand, and whole spaces."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from landscapes import SPACES, Landscape, best_final, drive, proposals, toy, unreliable

from depthsearch.searchers import build_searcher
from depthsearch.space import Budget, Evaluation, Hints, Mask, Proposal, SearchSpace, Status

Dropped = tuple[int, ...]

# Two blocks, attention costs 1 and FFN 3: 8 in all, of which the budget keeps 4.
HALF = toy(2, Budget("params", ratio=0.5, of="blocks"))
INCREASE = {0: 0.4, 1: 0.9, 2: 0.2, 3: 0.5}


def flat(sites: int) -> Hints:
    return Hints(((1.0,) * (sites + 1),) * (sites + 1), ((0.0,) * (sites + 1),) * (sites + 1))


def additive(proposal: Proposal, failing: Mapping[Dropped, Status] | None = None) -> Evaluation:
    status = (failing or {}).get(proposal.mask.dropped, Status.OK)
    loss = 1.0 + sum(INCREASE[i] for i in proposal.mask.dropped)
    return Evaluation(proposal.mask, (loss,) if status.has_loss else (), 1, status)


def asked(width: int, failing: Mapping[Dropped, Status] | None = None) -> list[list[Dropped]]:
    options = {"width": width, "expand": 0}
    searcher = build_searcher("beam", HALF, flat(4), np.random.default_rng(0), options)
    record = drive(searcher, lambda p: additive(p, failing))
    return [sorted(proposal.mask.dropped for proposal in batch.proposals) for batch, _ in record]


SINGLES: list[Dropped] = [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize("rule", ["cost_aware", "plain"])
@pytest.mark.parametrize("name", SPACES)
def test_a_beam_of_one_is_greedy(name: str, rule: str) -> None:
    space = SPACES[name]
    for seed in range(4):
        landscape = Landscape(len(space.sites), seed, scatter=seed % 2)
        paths = []
        for method, options in (("greedy", {}), ("beam", {"width": 1, "expand": 0})):
            rng = np.random.default_rng(seed)
            searcher = build_searcher(
                method, space, landscape.hints(), rng, {"rule": rule, **options}
            )
            record = drive(searcher, unreliable(landscape, 0.1 * seed))
            paths.append(
                [(batch.survivors, [p.mask for p in batch.proposals]) for batch, _ in record]
            )
        assert paths[0] == paths[1]


def test_masks_are_kept_by_what_they_cost_from_the_dense_model_on() -> None:
    # Prices of the first step 0.4, 0.3, 0.2, 0.167: the second block's FFN and attention are kept.
    # Their children that cost least for what they free are both on budget (0.175 and 0.225, before
    # 0.275 and 0.3 of those without the second FFN), which ends the search.
    assert asked(2) == [[()], SINGLES, [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]]
    # A third parent, the first FFN, adds one mask.
    assert asked(3) == [[()], SINGLES, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]]


def test_masks_of_one_parent_are_told_apart_by_what_the_last_step_cost() -> None:
    failing = dict.fromkeys([(2,), (1,), (0,)], Status.FAILED)
    assert asked(2, failing) == [[()], SINGLES, [(0, 3), (1, 3), (2, 3)]]


def test_a_step_in_which_all_fail_ends_the_search() -> None:
    assert asked(3, dict.fromkeys(SINGLES, Status.FAILED)) == [[()], SINGLES]


@pytest.mark.parametrize("expand", [0, 16])
def test_masks_that_meet_the_budget_do_not_race_with_larger_ones(expand: int) -> None:
    options = {"width": 2, "rule": "plain", "expand": expand}
    searcher = build_searcher("beam", HALF, flat(4), np.random.default_rng(0), options)
    batches = [batch for batch, _ in drive(searcher, additive)][bool(expand) :]
    assert batches[0].survivors == 2
    assert {p.final for p in batches[1].proposals} == {False, True}
    assert batches[1].survivors is None


def test_only_the_most_promising_children_are_evaluated() -> None:
    # The best two sites are 3 and 5, where a single mask starts with 1.
    space = toy(3, Budget("sites", drop=2))
    alone = {0: 0.5, 1: 0.1, 2: 0.6, 3: 0.2, 4: 0.7, 5: 0.25}

    def answer(proposal: Proposal) -> Evaluation:
        gone = proposal.mask.dropped
        loss = 0.35 if gone == (3, 5) else sum(alone[i] for i in gone) + 0.3 * (len(gone) > 1)
        return Evaluation(proposal.mask, (1.0 + loss,), 1)

    found = {}
    for width, expand in ((1, 0), (2, 1), (2, 2)):
        options = {"width": width, "expand": expand}
        searcher = build_searcher("beam", space, flat(6), np.random.default_rng(0), options)
        record = drive(searcher, answer)
        assert record[2][0].survivors == width
        found[width, expand] = [p.mask.dropped for p in record[2][0].proposals]
        best = best_final(record).mask
        assert (best == Mask.dropping(6, [3, 5])) == (expand == 2)
    assert found[1, 0] == [(0, 1), (1, 2), (1, 3), (1, 4), (1, 5)]
    # Of 1 and of 3 the cheapest child is the same; the next ones join 5 to each.
    assert found[2, 1] == [(1, 3)]
    assert found[2, 2] == [(1, 3), (1, 5), (3, 5)]


@pytest.mark.parametrize("name", ["drop_sites", "block", "drop_blocks", "attention_kv", "ffn"])
def test_a_beam_without_bounds_reaches_every_mask(name: str) -> None:
    space = SPACES[name]
    landscape = Landscape(len(space.sites))
    options = {"width": 10_000, "expand": 0}
    searcher = build_searcher("beam", space, landscape.hints(), np.random.default_rng(0), options)
    record = drive(searcher, lambda p: landscape.evaluate(p.mask))
    masks = space.enumerate()
    assert masks is not None
    assert {p.mask for p in proposals(record) if p.final} == set(masks)


def test_ends_on_budget_where_pairs_run_out() -> None:
    space = toy(30, packable=True, protected=(0, 1, 2, 59))
    landscape = Landscape(60)
    options = {"width": 2, "expand": 4}
    searcher = build_searcher("beam", space, landscape.hints(), np.random.default_rng(0), options)
    last = proposals(drive(searcher, lambda p: landscape.evaluate(p.mask)))[-1]
    assert last.final
    assert space.on_budget(last.mask)


@pytest.mark.parametrize(
    ("space", "expand", "times"),
    [
        (toy(12, Budget("sites", drop=8)), 0, 3.6),
        (toy(12, Budget("sites", drop=8)), 16, 2.9),
        (toy(12, packable=True), 8, 1.4),
        (toy(10), 16, 2.9),
    ],
    ids=["sites", "sites bounded", "packable", "params"],
)
def test_a_beam_ends_lower_than_greedy_on_average(
    space: SearchSpace, expand: int, times: float
) -> None:
    """For at most `times` greedy's evaluations, over eight landscapes."""
    found: dict[str, list[tuple[float, int]]] = {"greedy": [], "beam": []}
    for seed in range(8):
        landscape = Landscape(len(space.sites), seed)
        for method, runs in found.items():
            options = {"expand": expand} if method == "beam" else {}
            searcher = build_searcher(
                method, space, landscape.hints(), np.random.default_rng(0), options
            )
            record = drive(searcher, lambda p, of=landscape: of.evaluate(p.mask))
            runs.append((best_final(record).loss or 0.0, len(proposals(record))))
    losses = {method: np.mean([loss for loss, _ in runs]) for method, runs in found.items()}
    counts = {method: sum(count for _, count in runs) for method, runs in found.items()}
    assert losses["beam"] < losses["greedy"]
    assert counts["beam"] <= times * counts["greedy"]
