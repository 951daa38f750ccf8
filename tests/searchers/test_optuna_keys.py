"""Optuna over ranking keys."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from landscapes import SPACES, Landscape, drive, proposals, toy, unreliable
from optuna.trial import TrialState

from depthsearch.errors import ConfigError
from depthsearch.searchers import build_searcher, cheap_baselines, check_storage
from depthsearch.searchers.optuna_keys import OptunaSearcher
from depthsearch.searchers.optuna_samplers import OptunaOptions, Sampler
from depthsearch.space import Budget, Evaluation, Proposal, SearchSpace, Status

LARGE = {
    **SPACES,
    "large": toy(30),
    "large_packable": toy(30, packable=True, protected=(0, 1, 2, 31, 59)),
    "large_attention": toy(30, Budget("kv_bytes", ratio=0.6), "attention"),
}

SAMPLERS = get_args(Sampler)


def searcher_of(space: SearchSpace, **options: object) -> OptunaSearcher:
    hints = Landscape(len(space.sites)).hints()
    found = build_searcher("optuna", space, hints, np.random.default_rng(0), options)
    assert isinstance(found, OptunaSearcher)
    return found


def system_attrs(study: optuna.Study) -> dict[str, Any]:
    """What samplers keep in the study; Optuna shows it to storages only."""
    return study._storage.get_study_system_attrs(study._study_id)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(LARGE)),
    sampler=st.sampled_from(["tpe", "cmaes"]),
    seed=st.integers(0, 2**32),
)
def test_keys_of_a_mask_decode_to_exactly_it(name: str, sampler: str, seed: int) -> None:
    space = LARGE[name]
    rng = np.random.default_rng(seed)
    mask = space.decode(rng.random(len(space.genes)).tolist())
    keys = searcher_of(space, sampler=sampler).keys_of(mask)
    assert all(0 <= key <= 1 for key in keys)
    assert len(set(keys)) == len(keys)
    assert space.decode(keys) == mask


@pytest.mark.parametrize("name", ["sublayer", "large_packable"])
def test_the_first_trials_are_the_baselines(name: str) -> None:
    space = LARGE[name]
    searcher = searcher_of(space)
    batch = searcher.ask()
    expected = cheap_baselines(space, Landscape(len(space.sites)).hints())
    assert batch.proposals == expected
    for trial, proposal in zip(searcher.study.trials, expected, strict=True):
        assert space.decode([trial.params[name] for name in sorted(trial.params)]) == proposal.mask


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_baselines_the_first_trials_are_the_samplers_own(sampler: str) -> None:
    searcher = searcher_of(LARGE["large"], sampler=sampler, baselines=False)
    batch = searcher.ask()
    assert {proposal.origin for proposal in batch.proposals} <= {
        f"optuna {sampler}", f"optuna {sampler} nearby"
    }  # fmt: skip
    assert len(batch.proposals) == OptunaOptions().batch


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trials_mirror_the_evaluations(sampler: str) -> None:
    space = SPACES["sublayer"]
    landscape = Landscape(12)
    answer = unreliable(landscape, 0.4)
    searcher = searcher_of(space, sampler=sampler)
    record = drive(searcher, answer, limit=40)
    told = {e.mask.key: e for _, evaluations in record for e in evaluations}
    for trial in searcher.study.trials:
        evaluation = told[trial.user_attrs["mask"]]
        assert trial.user_attrs["cost"] == space.cost(evaluation.mask)
        if evaluation.loss is None:
            assert trial.state is TrialState.FAIL
        else:
            assert trial.state is TrialState.COMPLETE
            if evaluation.status is Status.OK:
                assert trial.value == evaluation.loss
    origins = Counter(trial.user_attrs["origin"] for trial in searcher.study.trials)
    assert origins[f"optuna {sampler}"] > 0
    assert sum(count for origin, count in origins.items() if origin != "duplicate") == len(told)


def test_masks_that_lost_on_easy_text_are_not_told_as_better() -> None:
    """The first windows are easier than all of them by a whole nat."""
    searcher = searcher_of(SPACES["sublayer"], sampler="tpe", batch=8)
    landscape = Landscape(len(SPACES["sublayer"].sites))
    for _ in range(4):
        asked = [p.mask for p in searcher.ask().proposals]
        whole = {mask: landscape.evaluate(mask) for mask in asked}
        best = min(whole.values(), key=lambda e: e.order)
        told = []
        for mask, evaluation in whole.items():
            mean = evaluation.loss
            assert mean is not None
            losses = (mean - 1, mean + 1)
            status = Status.OK if mask == best.mask else Status.ELIMINATED
            told.append(Evaluation(mask, losses[: 1 + (status is Status.OK)], 8, status))
        searcher.tell(told)
    trials = [t for t in searcher.study.trials if t.state is TrialState.COMPLETE]
    first = min(t.value for t in trials if t.user_attrs["status"] == "ok")
    lost = [t.value for t in trials if t.user_attrs["status"] == "eliminated"]
    assert len(lost) > 20
    assert min(lost) >= first


def test_the_best_baseline_of_others_is_asked_for_whatever_was_lost_on_easy_text() -> None:
    searcher = searcher_of(toy(6), sampler="random", batch=4)
    own = [p.mask for p in searcher.ask(4).proposals]
    lost = Evaluation(own[-1], (0.3,), 8, Status.ELIMINATED)
    searcher.tell([*(Evaluation(mask, (1.0,) * 4, 32) for mask in own[:-1]), lost])
    others = [p.mask for p in cheap_baselines(toy(6), Landscape(12).hints()) if p.mask not in own]
    for number, mask in enumerate(others):
        searcher.learn(mask, searcher.keys_of(mask), 1.2 if number else 0.8, True)
    assert others[0] in [p.mask for p in searcher.ask(4).proposals]


def test_several_masks_are_asked_in_parallel() -> None:
    searcher = searcher_of(SPACES["sublayer"], batch=6)
    landscape = Landscape(12)
    drive(searcher, lambda p: landscape.evaluate(p.mask), limit=1)
    batch = searcher.ask()
    assert len({proposal.mask for proposal in batch.proposals}) == 6
    running = [t for t in searcher.study.trials if t.state is TrialState.RUNNING]
    assert len(running) >= 6
    searcher.tell([landscape.evaluate(p.mask) for p in batch.proposals[:2]])
    assert all(t.state is not TrialState.RUNNING for t in searcher.study.trials)


@pytest.mark.parametrize(("n", "size"), [(None, 3), (100, 3), (2, 2)])
def test_an_ask_for_more_is_no_larger_than_a_batch(n: int | None, size: int) -> None:
    """A sampler learns from each batch, so a limit far away must not make one of them all."""
    searcher = searcher_of(toy(12), batch=3)
    landscape = Landscape(24)
    drive(searcher, lambda p: landscape.evaluate(p.mask), limit=1)
    for _ in range(3):
        batch = searcher.ask(n)
        assert len(batch.proposals) == size
        searcher.tell([landscape.evaluate(p.mask) for p in batch.proposals])


def test_a_stored_study_holds_the_search_and_is_not_overwritten(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    space, landscape = SPACES["drop_blocks"], Landscape(14)
    options = {"storage": url, "study_name": "run-1"}
    first = drive(searcher_of(space, **options), lambda p: landscape.evaluate(p.mask), limit=7)
    study = optuna.load_study(study_name="run-1", storage=url)
    masks = {trial.user_attrs["mask"] for trial in study.trials}
    assert masks == {proposal.mask.key for proposal in proposals(first)}
    assert study.best_value == min(e.loss or 9.0 for _, found in first for e in found)

    with pytest.raises(ConfigError, match="'run-1' exists already") as caught:
        searcher_of(space, **options)
    assert "fresh: true" in str(caught.value)
    again = drive(
        searcher_of(space, **options, fresh=True), lambda p: landscape.evaluate(p.mask), limit=7
    )
    in_memory = drive(searcher_of(space), lambda p: landscape.evaluate(p.mask), limit=7)
    assert proposals(again) == proposals(first) == proposals(in_memory)
    assert [study.study_name for study in optuna.get_all_study_summaries(url)] == ["run-1"]


@pytest.mark.parametrize(
    "storage", ["nonsense", "sqlite:////no/such/folder/study.db", "postgresql://me:secret@host/x"]
)
def test_a_storage_that_cannot_be_opened_is_one_line(storage: str) -> None:
    with pytest.raises(ConfigError, match="storage") as caught:
        searcher_of(SPACES["block"], storage=storage)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("sampler", "extra"), [("cmaes", "cma"), ("gp", "scipy"), ("qmc", "scipy")]
)
def test_a_sampler_without_its_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, sampler: str, extra: str
) -> None:
    monkeypatch.setattr("depthsearch.searchers.optuna_samplers.find_spec", lambda _: None)
    for refusing in (searcher_of, lambda _, **options: check_storage("optuna", options)):
        with pytest.raises(ConfigError, match=rf"pip install depthsearch\[{extra}\]"):
            refusing(SPACES["block"], sampler=sampler)


def test_cmaes_goes_on_when_every_baseline_failed() -> None:
    space, landscape = SPACES["sublayer"], Landscape(12)
    seeds = {p.mask for p in cheap_baselines(space, landscape.hints())}

    def answer(proposal: Proposal) -> Evaluation:
        if proposal.mask in seeds:
            return Evaluation(proposal.mask, (), 0, Status.OUT_OF_MEMORY)
        return landscape.evaluate(proposal.mask)

    record = drive(searcher_of(space, sampler="cmaes"), answer, limit=30)
    assert len(proposals(record)) >= 30


def test_optuna_stays_silent_and_its_verbosity_is_restored(
    capfd: pytest.CaptureFixture[str],
) -> None:
    level = optuna.logging.get_verbosity()
    landscape = Landscape(16)
    for sampler in SAMPLERS:
        drive(
            searcher_of(SPACES["block"], sampler=sampler),
            unreliable(landscape, 0.5),
            limit=20,
        )
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert optuna.logging.get_verbosity() == level


def test_options_have_safe_defaults() -> None:
    options = OptunaOptions()
    assert options.storage is None
    assert not options.fresh


def test_what_cannot_work_is_refused_before_anything_starts(tmp_path: Path) -> None:
    check_storage("optuna", {"storage": f"journal:{tmp_path / 'study.log'}"})
    for storage in (f"sqlite:///{tmp_path}/missing/study.db", "nothing://user:secret@host/0"):
        with pytest.raises(ConfigError) as caught:
            check_storage("optuna", {"storage": storage})
        assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="needs a 'storage'"):
        check_storage("optuna", {"shared": True})
    with pytest.raises(ConfigError, match="would delete the study"):
        check_storage("optuna", {"shared": True, "fresh": True, "storage": "sqlite://"})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_stored_study_is_that_in_memory_without_what_samplers_keep(
    tmp_path: Path, sampler: str
) -> None:
    """CMA-ES, for one, would pickle its state into a storage."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    space, landscape = SPACES["sublayer"], Landscape(12)
    searcher = searcher_of(space, storage=url, sampler=sampler)
    record = drive(searcher, unreliable(landscape, 0.3), n=9, limit=30)
    in_memory = drive(searcher_of(space, sampler=sampler), unreliable(landscape, 0.3), 9, limit=30)
    assert proposals(record) == proposals(in_memory)
    stored = optuna.load_study(study_name="depthsearch", storage=url)
    assert system_attrs(stored) == {}
    assert len(stored.trials) == len(searcher.study.trials)
    for kept, trial in zip(stored.trials, searcher.study.trials, strict=True):
        assert kept.system_attrs == {}
        assert kept.user_attrs == trial.user_attrs
        assert (kept.number, kept.state, kept.value) == (trial.number, trial.state, trial.value)
        assert kept.params == pytest.approx(trial.params, rel=1e-15)


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3"])
@pytest.mark.parametrize("n", [None, 3])
def test_the_first_parents_are_the_best_baselines(sampler: str, n: int | None) -> None:
    space, landscape = toy(12), Landscape(24)
    searcher = searcher_of(space, sampler=sampler, population=5)
    baselines = len(cheap_baselines(space, landscape.hints()))
    assert baselines > 10
    drive(searcher, lambda p: landscape.evaluate(p.mask), n, limit=baselines)
    batch = searcher.ask(2)
    assert all(p.origin.startswith(f"optuna {sampler}") for p in batch.proposals)
    trials = searcher.study.trials
    best = sorted(trials[:baselines], key=lambda trial: trial.value)[:5]
    (parents,) = (v for k, v in system_attrs(searcher.study).items() if "parent:1" in k)
    assert sorted(parents) == sorted(trial.number for trial in best)
    # One key in twenty-four is drawn anew on average; the others come from a parent.
    alleles = {name: {trial.params[name] for trial in best} for name in trials[0].params}
    children = trials[baselines:]
    inherited = sum(t.params[name] in found for t in children for name, found in alleles.items())
    assert inherited > 0.6 * len(children) * len(alleles)


def test_qmc_draws_sobol_points_from_the_first_on() -> None:
    """Baselines use up no point of the sequence."""
    from scipy.stats.qmc import Sobol

    space, landscape = toy(20), Landscape(40)
    searcher = searcher_of(space, sampler="qmc")
    drive(searcher, lambda p: landscape.evaluate(p.mask), limit=60)
    drawn = [
        list(trial.params.values())
        for trial in searcher.study.trials
        if trial.user_attrs["origin"] == "optuna qmc"
    ]
    assert len(drawn) > 10
    seed = int(np.random.default_rng(0).integers(2**31))
    points = Sobol(len(space.genes), scramble=True, seed=seed).random(16)
    np.testing.assert_allclose(drawn[:10], points[:10], rtol=1e-12)


def test_gp_leaves_chance_behind() -> None:
    space, landscape = toy(12), Landscape(24)
    means = {}
    for sampler in ("gp", "random"):
        searcher = searcher_of(space, sampler=sampler)
        baselines = len(cheap_baselines(space, landscape.hints()))
        drive(searcher, lambda p: landscape.evaluate(p.mask), limit=baselines + 24)
        losses = [t.value for t in searcher.study.trials[baselines:] if t.value is not None]
        means[sampler] = np.mean(losses)
    assert means["gp"] < 0.8 * means["random"]
