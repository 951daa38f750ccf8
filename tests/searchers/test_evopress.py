"""EvoPress: what its offspring and stages look like, and how it ends."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from landscapes import Landscape, drive, proposals, toy

from depthsearch.errors import ConfigError
from depthsearch.searchers import build_searcher
from depthsearch.searchers.baselines import cheap_baselines
from depthsearch.searchers.evopress import (
    EvoPressOptions,
    balanced,
    evopress_plan,
    kinds_of,
    published_generations,
    switched,
)
from depthsearch.space import Budget, Evaluation, Mask, Stage, Status


def kinds_dropped(mask: Mask) -> tuple[int, int]:
    gone = [index % 2 for index in mask.dropped]
    return gone.count(0), gone.count(1)


def test_first_masks_drop_as_many_of_each_kind() -> None:
    space = toy(8, Budget("sites", drop=6))
    rng = np.random.default_rng(0)
    masks = {balanced(space, rng, kinds_of(space)) for _ in range(50)}
    assert len(masks) > 40
    assert {kinds_dropped(mask) for mask in masks} == {(3, 3)}


def test_a_switch_stays_within_a_kind_and_is_small() -> None:
    space = toy(8, Budget("sites", drop=6))
    rng = np.random.default_rng(0)
    kinds = kinds_of(space)
    parent = balanced(space, rng, kinds)
    sizes = []
    for _ in range(300):
        child = switched(space, rng, parent, kinds)
        assert kinds_dropped(child) == kinds_dropped(parent)
        sizes.append(len(set(child.dropped) - set(parent.dropped)))
    assert set(sizes) <= {0, 1, 2, 3}
    # The smaller of two draws from 1 to 3 is 1 in five of nine cases.
    assert 0.45 < sizes.count(1) / len(sizes) < 0.75


@pytest.mark.parametrize(
    ("dropped", "expected"),
    [((0, 1), 5), ((0, 1, 2, 3), 8), ((0, 2, 4, 6), 11), ((), 1)],
)
def test_the_published_number_of_generations(dropped: tuple[int, ...], expected: int) -> None:
    """Of 8 blocks: 1 x 7, 2 x 6 and 4 x 4 choices over 1.5, rounded up."""
    space = toy(8, Budget("sites", drop=2))
    assert published_generations(space.dense.without(dropped), kinds_of(space)) == expected


def test_stages_parents_and_the_end() -> None:
    space = toy(16)
    landscape = Landscape(len(space.sites), 0)
    options = EvoPressOptions(offspring=4, initial=3, screen=0.25, survivors=2, generations=5)
    plan = evopress_plan(space, landscape.hints(), np.random.default_rng(0), options)
    batch = next(plan)
    assert [p.origin for p in batch.proposals] == ["evopress random"] * 3
    assert batch.stages == (Stage(0.25, 1),)
    best, generations = None, 0
    known: dict[Mask, Evaluation] = {}
    while True:
        # Only the first two are judged to the end, as a stage leaves them.
        found = [landscape.evaluate(proposal.mask) for proposal in batch.proposals]
        for e in found[2:]:
            known[e.mask] = Evaluation(e.mask, e.losses[:1], e.tokens, Status.ELIMINATED)
        known |= {e.mask: e for e in found[:2]}
        complete = sorted(
            (e for e in known.values() if e.status is Status.OK), key=lambda e: e.order
        )
        best = complete[0].mask
        try:
            batch = plan.send(known)
        except StopIteration:
            break
        generations += 1
        assert batch.stages == (Stage(0.25, 2),)
        for proposal in batch.proposals:
            swapped = set(proposal.mask.dropped) ^ set(best.dropped)
            assert 0 < len(swapped) <= 8
            assert proposal.mask not in known
    assert generations == 5


def test_it_can_start_from_the_best_baseline() -> None:
    space = toy(16)
    landscape = Landscape(len(space.sites), 0)
    options = EvoPressOptions(offspring=4, screen=0.5, baselines=True)
    plan = evopress_plan(space, landscape.hints(), np.random.default_rng(0), options)
    batch = next(plan)
    assert batch.proposals == cheap_baselines(space, landscape.hints())
    assert batch.stages == (Stage(0.5, 1),)
    known = {p.mask: landscape.evaluate(p.mask) for p in batch.proposals}
    best = min(known.values(), key=lambda e: e.order).mask
    for proposal in plan.send(known).proposals:
        assert proposal.origin == "evopress switch"
        assert 0 < len(set(proposal.mask.dropped) ^ set(best.dropped)) <= 8


@pytest.mark.parametrize("runs", [False, True])
def test_half_of_the_offspring_can_come_from_moves_of_whole_stretches(runs: bool) -> None:
    """A window of 16 sites keeps its one gap when it is moved, which no three swaps do."""
    space = toy(32, Budget("sites", drop=16))
    window = space.dense.without(range(20, 36))
    options = EvoPressOptions(offspring=200, initial=1, runs=runs)
    plan = evopress_plan(space, Landscape(64).hints(), np.random.default_rng(0), options)
    (first,) = next(plan).proposals
    losses = (1.0,) * 6
    known = {first.mask: Evaluation(first.mask, losses, 384, Status.OK)}
    # The parent is what did best: the window, once it is known under the name of the first mask.
    known[first.mask] = replace(known[first.mask], mask=window)
    proposals = plan.send(known).proposals
    offspring = [p.mask for p in proposals]
    switches = [p.mask for p in proposals if p.origin == "evopress switch"]
    assert 20 < len(offspring) - len(switches) < 130 if runs else len(switches) == 200
    assert all(len(set(mask.dropped) - set(window.dropped)) <= 3 for mask in switches)
    far = [mask for mask in offspring if len(set(mask.dropped) - set(window.dropped)) > 3]
    whole = [mask for mask in offspring if len(mask.runs) == 1]
    assert all(space.on_budget(mask) for mask in offspring)
    assert (len(far) > 20) is runs
    assert (len(whole) > 5) is runs


def test_until_something_worked_it_draws_at_random() -> None:
    space = toy(16)
    searcher = build_searcher(
        "evopress", space, Landscape(len(space.sites)).hints(), np.random.default_rng(0),
        {"initial": 4, "generations": 6},
    )  # fmt: skip
    record = drive(searcher, lambda p: Evaluation(p.mask, (), 0, Status.FAILED))
    assert {p.origin for p in proposals(record)} == {"evopress random"}
    assert len(record) == 7


def test_a_screen_of_nothing_is_refused() -> None:
    for share in (0.0, 1.5):
        with pytest.raises(ConfigError, match="option 'screen' is above 0, at most 1"):
            EvoPressOptions(screen=share)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_as_large_a_share_goes_on_where_a_generation_is_asked_for_in_parts(n: int) -> None:
    """Of 16 offspring 2 are judged on all text, so of each part at least an eighth is."""
    space = toy(8, Budget("sites", drop=6))
    landscape = Landscape(len(space.sites), 0)
    options = {"offspring": 16, "screen": 0.25}
    searcher = build_searcher(
        "evopress", space, landscape.hints(), np.random.default_rng(0), options
    )
    whole = build_searcher("evopress", space, landscape.hints(), np.random.default_rng(0), options)
    first = whole.ask()
    (stage,) = first.stages
    asked = 0
    while asked < len(first.proposals):
        batch = searcher.ask(n)
        asked += len(batch.proposals)
        share = stage.survivors * len(batch.proposals) / len(first.proposals)
        assert batch.stages == (Stage(0.25, max(1, math.ceil(share))),)
        searcher.tell([landscape.evaluate(proposal.mask) for proposal in batch.proposals])
