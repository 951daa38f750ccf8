"""Searches that compare masks by another loss than the finalists are ranked by, or by gradients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_runs import workplace_config

from depthsearch.calibration.objectives import OBJECTIVES
from depthsearch.errors import ConfigError, JournalError
from depthsearch.evaluation import InProcess
from depthsearch.journal import read_journal, without_times
from depthsearch.run.compare import compare
from depthsearch.run.directory import BEST, CONFIG, JOURNAL
from depthsearch.run.search import resume, search
from depthsearch.run.session import Session
from depthsearch.space import Mask

SCORED = {"method": "evolution", "max_evaluations": 40, "finalists": 6, "score": "angular"}


@pytest.fixture(scope="module")
def scored(
    session: Session, workplace: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Session, Path]:
    """A finished search by the angle of logits, its finalists ranked by the KL divergence."""
    config = workplace_config(workplace, search=SCORED)
    out = tmp_path_factory.mktemp("scored") / "run"
    own = replace(session, config=config)
    search(config, out, session=own)
    return own, out


@pytest.fixture(scope="module")
def sensitive(
    session: Session, workplace: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Session, Path]:
    """A finished run of the method `sensitivity`."""
    config = workplace_config(workplace, search={"method": "sensitivity"})
    out = tmp_path_factory.mktemp("sensitive") / "run"
    own = replace(session, config=config)
    search(config, out, session=own)
    return own, out


def records_of(run: Path, op: str) -> list[dict[str, Any]]:
    return [record for record in read_journal(run / JOURNAL) if record["op"] == op]


def losses_by(session: Session, windows: Any, kind: str, mask: Mask) -> list[float]:
    """The losses of one mask, from a backend made for nothing else."""
    judge = InProcess(
        session.loaded.model, session.anatomy, windows, OBJECTIVES[kind](),
        mode=session.check.mode, batch_tokens=64, positions=0.25, seed=0,
    )  # fmt: skip
    return [x for b in range(len(judge.sequences)) for x in judge.run(b, [mask]).losses[0]]


def test_asks_are_answered_by_the_score_and_finals_by_the_objective(
    scored: tuple[Session, Path],
) -> None:
    session, run = scored
    splits = session.splits(0)
    told = [e for record in records_of(run, "tell") for e in record["evaluations"]]
    (finals,) = records_of(run, "finals")
    checked = [e for e in told if e["status"] == "ok"][::4]
    assert len(checked) >= 3
    for evaluations, windows, kind in (
        (checked, splits.select, "angular"),
        (finals["evaluations"], splits.finals, "kl"),
    ):
        for evaluation in evaluations:
            mask = Mask.from_key(evaluation["mask"])
            assert evaluation["losses"] == losses_by(session, windows, kind, mask)


def test_several_baselines_are_ranked_and_the_best_of_them_is_held_against_the_result(
    scored: tuple[Session, Path],
) -> None:
    """The best by the score alone need not be the best by the objective."""
    _, run = scored
    (finals,) = records_of(run, "finals")
    mean = {e["mask"]: e["loss"] for e in finals["evaluations"]}
    assert len(finals["baselines"]) >= 3
    assert set(finals["baselines"]) <= set(mean)
    assert mean[finals["best"]] <= min(mean[key] for key in finals["baselines"])


def test_the_record_says_what_judged_what(scored: tuple[Session, Path], session: Session) -> None:
    own, run = scored
    (start,) = records_of(run, "start")
    assert start["config"]["search"]["score"] == "angular"
    assert "search on angular, finals on kl, windows" in start["signature"]["protocol"]
    assert json.loads((run / BEST).read_text())["signature"] == start["signature"]
    plain = session.signature(session.splits(0), 0)["protocol"]
    assert "search on kl, windows" in plain
    same = own.config.search.model_copy(update={"score": "kl"})
    said = replace(own, config=own.config.model_copy(update={"search": same}))
    assert said.signature(own.splits(0), 0)["protocol"] == plain
    assert said.plan().baselines == 1
    assert own.plan().baselines == 3


def test_a_run_is_not_continued_by_another_score(
    scored: tuple[Session, Path], workplace: Path, tmp_path: Path
) -> None:
    session, run = scored
    for name in (CONFIG, JOURNAL):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    resume(tmp_path, session=session)
    assert (tmp_path / BEST).read_bytes() == (run / BEST).read_bytes()
    config = workplace_config(workplace, search=SCORED | {"score": "js"})
    with pytest.raises(JournalError, match=r"signature\.protocol"):
        resume(tmp_path, session=replace(session, config=config))


def test_streamed_weights_score_alike(
    scored: tuple[Session, Path], workplace: Path, tmp_path: Path
) -> None:
    config = workplace_config(workplace, search=SCORED, model={"streamed": True})
    search(config, tmp_path / "run")
    journals = [without_times(read_journal(r / JOURNAL)) for r in (scored[1], tmp_path / "run")]
    assert journals[0] == journals[1]


def test_arms_may_differ_in_what_they_search_by(
    session: Session, workplace: Path, tmp_path: Path
) -> None:
    arms = {
        "kl": {"method": "windows"},
        **{kind: {"method": "windows", "score": kind} for kind in ("angular", "norm", "js")},
    }
    config = workplace_config(workplace, compare={"arms": arms, "seeds": [0]})
    result = compare(config, tmp_path / "out", session=replace(session, config=config))
    assert {entry["name"]: entry["score"] for entry in result["arms"]} == {a: a for a in arms}
    own = session.splits(0)
    for entry in result["arms"]:
        mask = Mask.from_key(entry["mask"])
        select = losses_by(session, own.select, entry["score"], mask)
        assert entry["select_loss"] == pytest.approx(sum(select) / len(select), rel=1e-12)
        fresh = losses_by(session, own.finals, "kl", mask)
        assert entry["finals_loss"] == pytest.approx(sum(fresh) / len(fresh), rel=1e-12)


def test_gradients_are_part_of_the_record_and_of_the_cost(
    sensitive: tuple[Session, Path], scored: tuple[Session, Path]
) -> None:
    session, run = sensitive
    (hints,) = records_of(run, "hints")
    select, _ = session.backends(session.splits(0), 0)
    found, cost = select.sensitivity()
    assert hints["sensitivity"] == found.to_json()
    (plain,) = records_of(scored[1], "hints")
    assert "sensitivity" not in plain
    assert {key: hints[key] for key in ("cosine", "angular")} == {
        key: plain[key] for key in ("cosine", "angular")
    }
    assert hints["cost_tokens"] == pytest.approx(plain["cost_tokens"] + cost, rel=1e-12)
    # 256 tokens, of which every pass takes less than one whole: most of a tiny model is its head.
    assert 1 * 256 < cost < 4 * 256
    (ask,) = records_of(run, "ask")
    (proposal,) = ask["proposals"]
    assert proposal["origin"] == "sensitivity, magnitude"
    least = sorted(range(8), key=lambda site: found.magnitude[site])
    assert not Mask.from_key(proposal["mask"]).keep[least[0]]


def test_a_resume_reads_the_gradients_instead_of_computing_them(
    sensitive: tuple[Session, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, run = sensitive
    lines = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / CONFIG).write_bytes((run / CONFIG).read_bytes())
    (tmp_path / JOURNAL).write_bytes(b"".join(lines[:2]))

    def again(_: InProcess) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(InProcess, "sensitivity", again)
    resume(tmp_path, session=session)
    journals = [without_times(read_journal(folder / JOURNAL)) for folder in (run, tmp_path)]
    assert journals[0] == journals[1]
    assert (tmp_path / BEST).read_bytes() == (run / BEST).read_bytes()


def test_gradients_are_refused_where_there_are_none(workplace: Path, tmp_path: Path) -> None:
    streamed = {"streamed": True}
    config = workplace_config(workplace, model=streamed, search={"method": "sensitivity"})
    with pytest.raises(ConfigError, match=r"sensitivity, which needs gradients"):
        search(config, tmp_path / "run")
    arms = {"windows": {"method": "windows"}, "gates": {"method": "sensitivity"}}
    config = workplace_config(workplace, model=streamed, compare={"arms": arms, "seeds": [0]})
    with pytest.raises(ConfigError, match=r"set model\.streamed to false"):
        compare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_limit_below_the_cost_of_gradients_is_refused(
    session: Session, workplace: Path, tmp_path: Path
) -> None:
    limit = {"method": "windows", "cost_tokens": 1800.0, "max_evaluations": None}
    config = workplace_config(workplace, search=limit)
    search(config, tmp_path / "windows", session=replace(session, config=config))
    config = workplace_config(workplace, search=limit | {"method": "sensitivity"})
    with pytest.raises(ConfigError, match="too little"):
        search(config, tmp_path / "run", session=replace(session, config=config))
    assert not (tmp_path / "run").exists()
