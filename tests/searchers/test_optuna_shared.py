"""Several searchers on one Optuna study, in one process and on real storages."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from landscapes import SPACES, Landscape, drive, proposals, toy, unreliable
from optuna.trial import TrialState

from depthsearch.errors import ConfigError, InputError, StorageError
from depthsearch.searchers import (
    Searcher,
    SharedSearcher,
    build_searcher,
    cheap_baselines,
    check_storage,
)
from depthsearch.searchers.optuna_shared import SharedOptunaSearcher
from depthsearch.space import Budget, Evaluation, Mask, Proposal, SearchSpace, Status

SEARCH = {"model": "a", "text": "b", "seed": 0}
SPACE = toy(10)
LANDSCAPE = Landscape(20)
BASELINES = cheap_baselines(SPACE, LANDSCAPE.hints())


def answer(proposal: Proposal) -> Evaluation:
    return LANDSCAPE.evaluate(proposal.mask)


def joined(
    url: str, member: str, space: SearchSpace = SPACE, search: Any = None, **options: object
) -> SharedOptunaSearcher:
    hints = Landscape(len(space.sites)).hints()
    found = build_searcher(
        "optuna",
        space,
        hints,
        np.random.default_rng(0),
        {"storage": url, "shared": True, **options},
    )
    assert isinstance(found, SharedOptunaSearcher)
    assert isinstance(found, SharedSearcher)
    found.join(member, SEARCH if search is None else search)
    return found


def trials_of(url: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="depthsearch", storage=url).trials


def step(searcher: Searcher, n: int | None = None) -> list[Mask]:
    """One ask and its tell."""
    batch = searcher.ask(n)
    searcher.tell([answer(proposal) for proposal in batch.proposals])
    return [proposal.mask for proposal in batch.proposals]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def test_other_searchers_are_not_shared() -> None:
    for options in ({}, {"storage": "sqlite://"}):
        found = build_searcher(
            "optuna", SPACE, LANDSCAPE.hints(), np.random.default_rng(0), options
        )
        assert not isinstance(found, SharedSearcher)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "cmaes"])
def test_each_learns_from_the_other_and_no_mask_is_asked_twice(url: str, sampler: str) -> None:
    first, second = joined(url, "a1", sampler=sampler), joined(url, "b2", sampler=sampler)
    asked: dict[str, list[Mask]] = {"a1": step(first), "b2": []}
    assert asked["a1"] == [proposal.mask for proposal in BASELINES]
    best = min(BASELINES, key=lambda proposal: answer(proposal).loss or 9.0)
    asked["b2"] += step(second)
    assert asked["b2"] == [best.mask], "the best baseline alone is evaluated once more"
    for _ in range(4):
        asked["a1"] += step(first)
        asked["b2"] += step(second, 3)
    assert set(asked["a1"]) & set(asked["b2"]) == {best.mask}
    trials = trials_of(url)
    for run, masks in asked.items():
        own = [t for t in trials if t.user_attrs["run"] == run]
        made = [t for t in own if t.user_attrs["origin"] != "duplicate"]
        assert [t.user_attrs["mask"] for t in made] == [mask.key for mask in masks]
        for trial in own:
            mask = Mask.from_key(trial.user_attrs["mask"])
            assert trial.state is TrialState.COMPLETE
            assert trial.value == LANDSCAPE.evaluate(mask).loss
            assert trial.user_attrs["cost"] == SPACE.cost(mask)
            assert SPACE.decode([trial.params[n] for n in sorted(trial.params)]) == mask
    # What was told last by the first is in the sampler of the second at its next ask.
    second.ask(1)
    seen = {t.user_attrs["mask"] for t in second._study()[0].study.trials}
    assert {mask.key for mask in asked["a1"]} <= seen


def test_together_they_exhaust_a_space(url: str) -> None:
    space = SPACES["drop_blocks"]
    landscape = Landscape(14)
    masks = space.enumerate()
    assert masks is not None
    members = [joined(url, member, space) for member in ("1", "2", "3")]
    asked: list[Mask] = []
    left = list(members)
    while left:
        for member in list(left):
            batch = member.ask(2)
            member.tell([landscape.evaluate(p.mask) for p in batch.proposals])
            asked += [p.mask for p in batch.proposals]
            if not batch.proposals:
                left.remove(member)
    counts = Counter(asked)
    assert set(counts) == set(masks)
    baselines = {p.mask for p in cheap_baselines(space, landscape.hints())}
    assert {mask for mask, count in counts.items() if count > 1} <= baselines


def test_a_mask_that_failed_elsewhere_may_be_tried_and_losses_of_lost_races_are_known(
    url: str,
) -> None:
    first = joined(url, "a1")
    batch = first.ask()
    flawed = unreliable(LANDSCAPE, 0.6)
    told = [flawed(proposal) for proposal in batch.proposals]
    first.tell(told)
    failed = {e.mask for e in told if e.loss is None}
    complete = [e for e in told if e.status is Status.OK]
    assert failed
    assert any(e.status is Status.ELIMINATED for e in told)
    second = joined(url, "b2").ask()
    best = min(complete, key=lambda e: e.order)
    assert {p.mask for p in second.proposals} == {best.mask, *failed}


def record_until_killed(url: str, steps: int, **options: object) -> list[Any]:
    """The asks and tells of the run a1, whose last ask is answered by nobody."""
    searcher = joined(url, "a1", **options)
    record = []
    for _ in range(steps):
        batch = searcher.ask()
        told = [answer(proposal) for proposal in batch.proposals]
        searcher.tell(told)
        record.append((batch, told))
    record.append((searcher.ask(), None))
    return record


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc", "nsga3", "cmaes"])
@pytest.mark.parametrize("known", [0, 1, 3])
def test_a_killed_run_follows_its_journal_and_goes_on(url: str, sampler: str, known: int) -> None:
    """`known` asks got into the journal; the others are orphans, or were told and learned."""
    record = record_until_killed(url, 3, sampler=sampler)
    before = trials_of(url)
    assert any(trial.state is TrialState.RUNNING for trial in before)
    again = joined(url, "a1", sampler=sampler)
    for batch, told in record[:known]:
        again.follow(batch)
        again.tell(told)
    assert len(trials_of(url)) == len(before), "following makes no trial"
    fresh = [p.mask for p in again.ask().proposals]
    followed = {p.mask for batch, _ in record[:known] for p in batch.proposals}
    assert fresh
    assert not followed & set(fresh)
    after = trials_of(url)
    running = [t for t in after if t.state is TrialState.RUNNING]
    assert {t.user_attrs["mask"] for t in running} == {mask.key for mask in fresh}
    again.tell([LANDSCAPE.evaluate(mask) for mask in fresh])
    states = Counter(t.state for t in trials_of(url))
    assert states[TrialState.RUNNING] == 0
    assert states[TrialState.FAIL] == sum(t.state is TrialState.RUNNING for t in before)


def test_the_ask_it_was_killed_in_is_answered_by_the_same_trials(url: str) -> None:
    record = record_until_killed(url, 2)
    before = trials_of(url)
    again = joined(url, "a1")
    for batch, told in record[:-1]:
        again.follow(batch)
        again.tell(told)
    last = record[-1][0]
    again.follow(last)
    again.tell([answer(proposal) for proposal in last.proposals])
    again.leave()
    after = trials_of(url)
    assert len(after) == len(before)
    found = {t.user_attrs["mask"]: t for t in after if t.user_attrs["origin"] != "duplicate"}
    for proposal in last.proposals:
        assert found[proposal.mask.key].value == answer(proposal).loss
    assert all(trial.state.is_finished() for trial in after)


def test_an_orphan_is_not_taken_for_the_trial_that_was_asked_later(url: str) -> None:
    (orphaned, _), = record_until_killed(url, 0)  # fmt: skip
    again = joined(url, "a1")
    batch = again.ask()
    assert batch.proposals == orphaned.proposals, "baselines, which the journal did not know"
    third = joined(url, "a1")
    third.follow(batch)
    third.tell([answer(proposal) for proposal in batch.proposals])
    states = Counter(t.state for t in trials_of(url))
    assert states == {TrialState.FAIL: len(BASELINES), TrialState.COMPLETE: len(BASELINES)}


def test_what_another_run_is_at_is_left_alone(url: str) -> None:
    other, own = joined(url, "b2"), joined(url, "a1")
    running = other.ask()
    step(own)
    own.leave()
    states = Counter(t.state for t in trials_of(url) if t.user_attrs["run"] == "b2")
    assert states == {TrialState.RUNNING: len(running.proposals)}


def test_members_with_one_seed_draw_other_masks(url: str) -> None:
    drawn = [
        [p.mask for p in (step(m), m.ask())[1].proposals]
        for m in (
            joined(url, "a1", study_name="x", sampler="random"),
            joined(url, "b2", study_name="y", sampler="random"),
        )
    ]
    assert not set(drawn[0]) & set(drawn[1])


def test_a_trial_that_somebody_ended_by_hand_stays_so(url: str) -> None:
    searcher = joined(url, "a1")
    batch = searcher.ask()
    study = optuna.load_study(study_name="depthsearch", storage=url)
    study.tell(0, state=TrialState.FAIL)
    searcher.tell([answer(proposal) for proposal in batch.proposals])
    states = [t.state for t in trials_of(url)]
    assert states == [TrialState.FAIL] + [TrialState.COMPLETE] * (len(batch.proposals) - 1)


@pytest.mark.parametrize(
    ("space", "search", "differs"),
    [
        (toy(10, Budget("params", ratio=0.7, of="blocks")), SEARCH, "space"),
        (SPACE, {**SEARCH, "seed": 1}, "seed"),
        (SPACE, {**SEARCH, "text": "c", "seed": 1}, "text, seed"),
        (SPACE, {**SEARCH, "more": 1}, "more"),
    ],
)
def test_studies_of_different_searches_do_not_mix(
    url: str, space: SearchSpace, search: dict[str, Any], differs: str
) -> None:
    joined(url, "a1")
    message = rf"shared by another search, which differs in: {differs};"
    with pytest.raises(ConfigError, match=message) as caught:
        joined(url, "b2", space, search)
    assert "\n" not in str(caught.value)
    options = {"storage": url, "shared": True}
    with pytest.raises(ConfigError, match=message):
        check_storage("optuna", options, space, search)
    check_storage("optuna", options, SPACE, SEARCH)
    assert len(trials_of(url)) == 0


def test_a_study_that_is_not_shared_is_not_joined_and_a_shared_one_not_taken(url: str) -> None:
    alone: dict[str, object] = {"storage": url, "study_name": "alone"}
    hints = LANDSCAPE.hints()
    drive(build_searcher("optuna", SPACE, hints, np.random.default_rng(0), alone), answer, limit=1)
    with pytest.raises(ConfigError, match="was not made by a search with 'shared: true'"):
        joined(url, "a1", study_name="alone")
    joined(url, "a1").ask()
    for options in ({"storage": url}, {"storage": url, "fresh": True}):
        with pytest.raises(ConfigError, match="'depthsearch' is shared by other runs"):
            check_storage("optuna", options)
        with pytest.raises(ConfigError, match="'depthsearch' is shared by other runs"):
            build_searcher("optuna", SPACE, hints, np.random.default_rng(0), options)
    assert len(trials_of(url)) == len(BASELINES)


def test_a_study_replaced_by_another_search_is_noticed(url: str) -> None:
    searcher = joined(url, "a1")
    step(searcher)
    study = optuna.load_study(study_name="depthsearch", storage=url)
    study.set_user_attr("depthsearch", {**study.user_attrs["depthsearch"], "seed": 7})
    with pytest.raises(ConfigError, match="differs in: seed"):
        searcher.ask()


def test_a_study_that_vanishes_is_one_line(url: str) -> None:
    searcher = joined(url, "a1")
    step(searcher)
    optuna.delete_study(study_name="depthsearch", storage=url)
    with pytest.raises(StorageError, match=r"the study was deleted.*depthsearch resume") as caught:
        step(searcher)
    assert "\n" not in str(caught.value)


def test_it_is_joined_before_it_is_asked(url: str) -> None:
    found = build_searcher(
        "optuna",
        SPACE,
        LANDSCAPE.hints(),
        np.random.default_rng(0),
        {"storage": url, "shared": True},
    )
    with pytest.raises(InputError, match="call join first"):
        found.ask()


def test_misuse_is_refused_as_of_any_searcher(url: str) -> None:
    searcher = joined(url, "a1")
    with pytest.raises(InputError, match="n=0"):
        searcher.ask(0)
    batch = searcher.ask(1)
    with pytest.raises(InputError, match="call tell first"):
        searcher.ask()
    with pytest.raises(InputError, match="call tell first"):
        searcher.follow(batch)


def test_small_asks_keep_every_promise(url: str) -> None:
    record = drive(joined(url, "a1"), answer, n=3, limit=40)
    asked = proposals(record)
    assert len({p.mask for p in asked}) == len(asked)
    assert all(SPACE.on_budget(p.mask) for p in asked)
