"""Optuna's samplers on loss and costs at several budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from landscapes import FRONTS, Landscape, drive, proposals, toy, unreliable
from optuna.trial import TrialState

from depthsearch.errors import ConfigError
from depthsearch.searchers import build_searcher, check_storage
from depthsearch.searchers.optuna_coding import BUDGET, Coding
from depthsearch.searchers.optuna_keys import OptunaSearcher
from depthsearch.searchers.ranking import influence_keys
from depthsearch.space import Budget, Evaluation, SearchSpace, Status, hypervolume

SAMPLERS = ("nsga2", "nsga3", "tpe", "qmc", "random")
SPACE = FRONTS["two costs"]


def searcher_of(
    space: SearchSpace = SPACE, seed: int = 0, landscape: int = 0, **options: object
) -> OptunaSearcher:
    hints = Landscape(len(space.sites), landscape).hints()
    rng = np.random.default_rng(seed)
    found = build_searcher("optuna", space, hints, rng, {"sampler": "nsga2", **options})
    assert isinstance(found, OptunaSearcher)
    return found


def costs_of(space: SearchSpace, key: str) -> list[float]:
    """Parameters and KV bytes of a mask of `toy`, by hand: 10 fixed, 1 and 3 a block; 2 a cache."""
    kept = [place for place, bit in enumerate(key) if bit == "1"]
    params = 10 + sum(3 if place % 2 else 1 for place in kept)
    return [float(params), float(2 * sum(place % 2 == 0 for place in kept))]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_values_are_the_loss_and_both_costs_and_the_pareto_front_is_theirs(sampler: str) -> None:
    landscape = Landscape(10)
    searcher = searcher_of(sampler=sampler)
    record = drive(searcher, unreliable(landscape, 0.2), limit=80)
    told = {e.mask.key: e for _, evaluations in record for e in evaluations}
    study = searcher.study
    assert [d.name for d in study.directions] == ["MINIMIZE"] * 3
    assert study.metric_names == ["loss", "params", "kv_bytes"]
    coding = Coding(SPACE, influence_keys(SPACE, landscape.hints()), 0.25)
    done = []
    for trial in study.trials:
        key = trial.user_attrs["mask"]
        # The parameters name a budget, and decode onto it to the mask that was judged.
        (point,) = [p for p in SPACE.points if p.budget.text == trial.params[BUDGET]]
        keys = [trial.params[name] for name in coding.names]
        assert point.decode(keys).key == key
        assert point.on_budget(point.decode(keys))
        evaluation = told[key]
        if evaluation.loss is None:
            assert trial.state is TrialState.FAIL
            continue
        # What lost its race is told by how far it was behind.
        lost_race = evaluation.status is Status.ELIMINATED
        loss = trial.values[0] if lost_race else evaluation.loss
        assert trial.values == [loss, *costs_of(SPACE, key)]
        done.append(trial)
    beaten = [
        any(
            a.values != b.values and all(x <= y for x, y in zip(a.values, b.values, strict=True))
            for a in done
        )
        for b in done
    ]
    expected = {t.number for t, lost in zip(done, beaten, strict=True) if not lost}
    assert {trial.number for trial in study.best_trials} == expected
    assert 1 < len(expected) < len(done)


def test_only_baselines_race_and_only_within_their_budget() -> None:
    landscape = Landscape(10)
    record = drive(searcher_of(), lambda p: landscape.evaluate(p.mask), limit=80)
    origins = [[p.origin for p in batch.proposals] for batch, _ in record]
    raced = [batch.survivors is not None for batch, _ in record]
    assert raced == [not any(o.startswith("optuna") for o in names) for names in origins]
    assert raced[0]
    assert not raced[-1]
    for batch, _ in record:
        if batch.survivors is not None:
            masks = [*(p.mask for p in batch.proposals), *batch.rivals]
            assert any(all(at.on_budget(mask) for mask in masks) for at in SPACE.points)


def test_what_lost_its_race_is_no_better_than_the_best_of_its_budget() -> None:
    """The best of the looser budget, at 0.1, is better than all and says nothing of the tighter."""
    searcher = searcher_of(FRONTS["one cost"])
    loose = searcher.ask().proposals
    searcher.tell([Evaluation(p.mask, (0.1,) * 6, 6) for p in loose])
    best, *others = searcher.ask().proposals
    assert others
    lost = [Evaluation(p.mask, (0.41,) * 2, 2, Status.ELIMINATED) for p in others]
    # Paired with the best, whose first sequences are easier than the others: 0.5 + 0.41 - 0.4.
    searcher.tell([Evaluation(best.mask, (0.4, 0.4, 0.55, 0.55, 0.55, 0.55), 6), *lost])
    told = [trial.values[0] for trial in searcher.study.trials[len(loose) :]]
    assert told == pytest.approx([0.5, *[0.51] * len(others)])


def test_the_further_budgets_try_a_part_of_their_windows() -> None:
    space = replace(toy(16), front=(Budget("params", ratio=0.6, of="blocks"),))
    landscape = Landscape(32)
    record = drive(searcher_of(space), lambda p: landscape.evaluate(p.mask), limit=90)
    windows = {p.mask for p in proposals(record) if p.origin.startswith("window")}
    own, further = space.points
    assert windows >= set(own.windows())
    tried = windows & set(further.windows())
    assert 1 <= len(tried) <= round(0.25 * len(further.windows())) + 1
    # They lie where the windows of the own budget were good.
    best = min(own.windows(), key=lambda mask: float(np.mean(landscape.losses(mask))))
    centre = sum(best.dropped) / len(best.dropped)
    near = [abs(sum(m.dropped) / len(m.dropped) - centre) for m in tried]
    everywhere = [abs(sum(m.dropped) / len(m.dropped) - centre) for m in further.windows()]
    assert np.mean(near) < np.mean(everywhere)


def test_every_mask_of_every_budget_has_parameters_of_its_own() -> None:
    for space in FRONTS.values():
        coding = Coding(space, [0.5] * len(space.genes), 0.25)
        for point in space.points:
            for mask in point.enumerate() or ():
                found = coding.encode(mask)
                assert coding.decode(found) == mask
                assert coding.read(coding.params(found)) == found
                assert all(0 <= key <= 1 for key in found.keys)


def test_selection_finds_a_better_front_than_drawing_at_random() -> None:
    """By the hypervolume of loss and both costs, at equal evaluations."""
    budget = Budget("params", ratio=0.75, of="blocks")
    pairs = tuple(replace(budget, also=Budget("kv_bytes", ratio=ratio)) for ratio in (0.75, 0.5))
    space = replace(toy(12, budget), front=pairs)

    def dominated(sampler: str, seed: int) -> float:
        landscape = Landscape(24, seed)
        searcher = searcher_of(space, seed, seed, sampler=sampler)
        record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=220)
        told = [e for _, evaluations in record for e in evaluations]
        rows = [[e.loss, *costs_of(space, e.mask.key)] for e in told if e.loss is not None]
        return hypervolume(rows, [1.0, 58.0, 24.0])

    assert np.mean([dominated("nsga2", s) - dominated("random", s) for s in range(3)]) > 0


@pytest.mark.parametrize("scheme", ["sqlite:///", "journal:"])
def test_a_storage_holds_the_same_study(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}{tmp_path / 'study'}"
    landscape = Landscape(10)
    searcher = searcher_of(storage=url)
    drive(searcher, unreliable(landscape, 0.3), limit=60)
    if scheme == "journal:":
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study"))
        stored = optuna.load_study(
            study_name="depthsearch", storage=optuna.storages.JournalStorage(backend)
        )
    else:
        stored = optuna.load_study(study_name="depthsearch", storage=url)
    assert stored.metric_names == ["loss", "params", "kv_bytes"]
    assert [(t.state, t.values, t.params) for t in stored.trials] == [
        (t.state, t.values, t.params) for t in searcher.study.trials
    ]
    assert {t.number for t in stored.best_trials} == {t.number for t in searcher.study.best_trials}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "cmaes"}, "'cmaes' minimizes one number.*choose nsga2"),
        ({"sampler": "gp"}, "'gp' takes seconds.*choose nsga2"),
        ({"shared": True, "storage": "sqlite:///study.db"}, "can't be shared: leave out"),
    ],
)
def test_what_can_not_search_a_front_is_refused_first(
    options: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        check_storage("optuna", options, SPACE, {})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    if "shared" not in options:
        with pytest.raises(ConfigError, match=message):
            searcher_of(**options)


def test_one_budget_is_searched_by_the_loss_alone() -> None:
    searcher = searcher_of(toy(5))
    landscape = Landscape(10)
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=40)
    assert len(searcher.study.directions) == 1
    assert all(BUDGET not in trial.params for trial in searcher.study.trials)
    statuses = {e.status for _, evaluations in record for e in evaluations}
    assert statuses == {Status.OK}
    assert all(batch.survivors for batch, _ in record)
