from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.tiny_runs import workplace_config

from depthsearch.calibration.windows import Splits, make_splits
from depthsearch.errors import ConfigError, NothingFoundError, RunDirectoryError
from depthsearch.journal import read_journal
from depthsearch.run.calibration_masks import check_heldout, mask_set, run_masks
from depthsearch.run.directory import JOURNAL
from depthsearch.run.search import search
from depthsearch.run.session import Session
from depthsearch.run.spaces import make_space
from depthsearch.searchers.baselines import influence_baselines, is_baseline
from depthsearch.space import Evaluation, Hints, Proposal, SearchSpace


@pytest.fixture(scope="module")
def hints(session: Session) -> Hints:
    return session.backend(session.splits(0).select, 0).hints()[0]


@pytest.fixture(scope="module")
def run(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("masks") / "run"
    search(workplace_config(workplace, search={"max_evaluations": 24}), out)
    return out


def changed(session: Session, **budget: float) -> SearchSpace:
    space = session.config.space
    settings = space.budget.model_copy(update={"keep_params": None, "of": "blocks"} | budget)
    config = space.model_copy(update={"budget": settings})
    return make_space(config, session.loaded.model, session.anatomy)


def test_a_set_holds_baselines_known_masks_and_offspring_all_on_budget(
    session: Session, hints: Hints
) -> None:
    space = session.space
    known = [Proposal(space.decode([float(g == k) for g in range(8)]), "known") for k in range(3)]
    found = mask_set(space, hints, 12, np.random.default_rng(0), known)
    masks = [proposal.mask for proposal in found]
    assert len(set(masks)) == len(masks) == 12
    assert all(space.on_budget(mask) for mask in masks)
    assert {p.mask for p in influence_baselines(space, hints)} <= set(masks)
    assert {p.mask for p in known} <= set(masks)
    assert sum(is_baseline(p.origin) for p in found) <= 6
    assert sum(p.origin.startswith(("offspring, ", "random")) for p in found) >= 3
    again = mask_set(space, hints, 12, np.random.default_rng(0), known)
    assert again == found


@pytest.mark.parametrize("count", [2, 3])
def test_the_smallest_sets_hold_a_known_mask_too(
    session: Session, hints: Hints, count: int
) -> None:
    known = [Proposal(mask, "known") for mask in (session.space.enumerate(1000) or ())[-4:]]
    found = mask_set(session.space, hints, count, np.random.default_rng(0), known)
    assert len(found) == count
    assert [p.origin for p in found].count("known") == 1


def test_a_small_space_gives_what_it_has_and_a_single_mask_is_refused(
    session: Session, hints: Hints
) -> None:
    small = changed(session, drop_sites=1)
    found = mask_set(small, hints, 24, np.random.default_rng(0))
    assert {p.mask for p in found} == set(small.enumerate() or ())
    one = changed(session, keep_params=1.0)
    with pytest.raises(NothingFoundError, match="holds 1 mask on budget"):
        mask_set(one, hints, 24, np.random.default_rng(0))


def test_a_run_gives_its_finalists_first_then_its_best_by_search_loss(
    session: Session, run: Path
) -> None:
    found = run_masks(run, session.space, session.loaded.fingerprint)
    records = read_journal(run / JOURNAL)
    (finals,) = [r for r in records if r["op"] == "finals"]
    ranked = sorted((Evaluation.from_json(e) for e in finals["evaluations"]), key=lambda e: e.order)
    masks = [proposal.mask for proposal in found]
    assert masks[: len(ranked)] == [e.mask for e in ranked]
    told = [Evaluation.from_json(e) for r in records if r["op"] == "tell" for e in r["evaluations"]]
    loss = {e.mask: e.loss for e in told if str(e.status) == "ok"}
    rest = [loss[mask] for mask in masks[len(ranked) :]]
    assert rest == sorted(rest)
    assert all(session.space.on_budget(mask) for mask in masks)
    assert all(proposal.origin.startswith("the run's, ") for proposal in found)


def test_a_run_of_another_space_or_model_is_refused(
    session: Session, run: Path, tmp_path: Path
) -> None:
    fingerprint = session.loaded.fingerprint
    with pytest.raises(RunDirectoryError, match="another model"):
        run_masks(run, session.space, "something else")
    with pytest.raises(RunDirectoryError, match="another space or budget"):
        run_masks(run, changed(session, keep_params=0.5), fingerprint)
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        run_masks(tmp_path, session.space, fingerprint)
    young = shutil.copytree(run, tmp_path / "young")
    first, *_ = (young / JOURNAL).read_text().splitlines(keepends=True)
    (young / JOURNAL).write_text(first)
    with pytest.raises(RunDirectoryError, match="has judged no mask"):
        run_masks(young, session.space, fingerprint)


def test_a_run_that_may_have_searched_on_what_is_held_out_is_refused(
    session: Session, run: Path, tmp_path: Path
) -> None:
    ours, fraction = session.documents.fingerprint, session.config.calibration.heldout_fraction
    check_heldout(run, ours, fraction)
    check_heldout(run, ours, fraction / 2)
    with pytest.raises(ConfigError, match=r"heldout_fraction is 0\.5, but .* held out 0\.25 and"):
        check_heldout(run, ours, 0.5)
    with pytest.raises(ConfigError, match="searched on another calibration text"):
        check_heldout(run, "of other documents", fraction)
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        check_heldout(tmp_path, ours, fraction)


def test_only_a_larger_share_holds_out_what_a_run_has_searched_on(session: Session) -> None:
    def splits(fraction: float, heldout_tokens: int) -> Splits:
        tokens = (16, 3200, 320, heldout_tokens)
        return make_splits(session.documents, session.loaded.tokenizer, *tokens, fraction, 0)

    run = splits(0.25, 320)
    searched = {*run.select_texts, *run.finals_texts}
    assert not searched & set(splits(0.1, 320).heldout_texts)
    assert searched & set(splits(0.5, 3200).heldout_texts)
