"""Searches that repair: the result and its weights, resumed, compared and exported."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.tiny_models import save_tiny
from tests.tiny_runs import workplace_config

from depthsearch.calibration import Documents
from depthsearch.calibration.windows import Other
from depthsearch.config import RunConfig
from depthsearch.errors import ConfigError, InputError, RunDirectoryError
from depthsearch.evaluation.worker import ModelSource, Worker
from depthsearch.journal import read_journal, without_times
from depthsearch.model import load
from depthsearch.model.patches import load_patches
from depthsearch.model.repair import patched
from depthsearch.report.comparison import summary_table
from depthsearch.run.compare import compare
from depthsearch.run.directory import BEST, CONFIG, JOURNAL, REPAIR
from depthsearch.run.figures import export_run
from depthsearch.run.fits import load_fit
from depthsearch.run.overfit import overfit
from depthsearch.run.search import resume, search
from depthsearch.run.session import Session
from depthsearch.run.workers import worker_text
from depthsearch.space import Mask
from depthsearch.tables import compare_table

SEARCH = {"max_evaluations": 12, "finalists": 2, "repair": "gap", "finish": "sequential"}


def configured(workplace: Path, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "calibration": {"fit_tokens": 128, "finals_fit_tokens": 512},
        "space": {"granularity": "block", "budget": {"drop_blocks": 1}},
        "search": SEARCH,
    }
    return workplace_config(workplace, **(settings | changes))


@pytest.fixture(scope="module")
def session(workplace: Path) -> Session:
    return Session.open(configured(workplace))


@pytest.fixture(scope="module")
def finished(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repaired") / "run"
    search(session.config, out, session=session)
    return out


def best_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / BEST).read_text())
    return found


def test_the_loss_on_fresh_data_is_that_of_the_weights_on_disk(
    finished: Path, session: Session
) -> None:
    best = best_of(finished)
    mask = Mask.from_key(best["mask"])
    model = session.loaded.model
    patches = load_patches(
        finished / REPAIR, model, session.anatomy, mask, best["repair"]["sha256"]
    )
    assert list(best["repair"]["sites"]) == [session.anatomy.sites[p.site].name for p in patches]
    assert patches
    unrepaired = session.backend(session.splits(0).finals, 0)

    def loss() -> float:
        units = [unrepaired.run(batch, [mask]) for batch in range(len(unrepaired.sequences))]
        losses = [loss for unit in units for loss in unit.losses[0]]
        return sum(losses) / len(losses)

    cut = loss()
    with patched(session.loaded.model, session.anatomy, patches):
        assert loss() == pytest.approx(best["finals_loss"], abs=1e-12)
    assert best["finals_loss"] < cut
    assert loss() == cut


def test_a_stopped_search_is_continued_to_the_same_weights(
    finished: Path, session: Session, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / CONFIG).write_bytes((finished / CONFIG).read_bytes())
    lines = (finished / JOURNAL).read_bytes().splitlines(keepends=True)
    (run / JOURNAL).write_bytes(b"".join(lines[: len(lines) // 2]))
    resume(run, session=session)
    journals = [without_times(read_journal(place / JOURNAL)) for place in (run, finished)]
    assert journals[0] == journals[1]
    for name in (BEST, REPAIR):
        assert (run / name).read_bytes() == (finished / name).read_bytes()


def test_a_finished_search_is_left_as_it_is_unless_its_weights_are_damaged(
    finished: Path, session: Session, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {name: (run / name).stat().st_mtime_ns for name in (BEST, REPAIR)}
    resume(run, session=session)
    assert {name: (run / name).stat().st_mtime_ns for name in (BEST, REPAIR)} == before
    (run / REPAIR).write_bytes(b"damaged")
    resume(run, session=session)
    assert (run / REPAIR).read_bytes() == (finished / REPAIR).read_bytes()


def test_repairs_looked_up_cost_the_same_when_a_search_goes_on(
    workplace: Path, tmp_path: Path
) -> None:
    space = {"granularity": "sublayer", "budget": {"drop_sites": 2}}
    chosen = SEARCH | {"method": "evolution", "repair": "table", "max_evaluations": 30}
    config = configured(workplace, search=chosen, space=space)
    session = Session.open(config)
    search(config, tmp_path / "whole", session=session)
    expected = without_times(read_journal(tmp_path / "whole" / JOURNAL))
    lines = (tmp_path / "whole" / JOURNAL).read_bytes().splitlines(keepends=True)
    for kept in range(2, len(lines), 2):
        run = tmp_path / str(kept)
        run.mkdir()
        (run / CONFIG).write_bytes((tmp_path / "whole" / CONFIG).read_bytes())
        (run / JOURNAL).write_bytes(b"".join(lines[:kept]))
        resume(run, session=session)
        assert without_times(read_journal(run / JOURNAL)) == expected
    best = best_of(tmp_path / "whole")
    assert best["repair"]["kind"] == "sequential"
    assert "candidates repaired (table) on 8 fit windows" in best["signature"]["protocol"]


def test_fit_text_is_nobody_elses(session: Session) -> None:
    splits = session.splits(0)
    assert splits.fit.numel() == 512
    windows = [tuple(row.tolist()) for part in (splits.select, splits.finals, splits.heldout)
               for row in part]  # fmt: skip
    assert not {tuple(row.tolist()) for row in splits.fit} & set(windows)
    plain = replace(session, config=configured_plain(session.config))
    assert plain.splits(0).fit.numel() == 0
    assert torch.equal(plain.splits(0).select, splits.select)
    assert torch.equal(plain.splits(0).heldout, splits.heldout)


def configured_plain(config: RunConfig) -> RunConfig:
    search_config = config.search.model_copy(update={"repair": "none", "finish": None})
    return config.model_copy(update={"search": search_config})


def test_the_signature_says_so(session: Session) -> None:
    protocol = session.signature(session.splits(0), 0)["protocol"]
    assert "candidates repaired (gap) on 8 fit windows" in protocol
    assert "finalists repaired (sequential) on 32 fit windows" in protocol
    repaired = session.config.search
    cut = repaired.model_copy(update={"repair": "none", "finish": None, "score": "angular"})
    protocol = session.signature(session.splits(0), 0, [repaired, cut, repaired])["protocol"]
    assert protocol.startswith("search on kl or angular, finals on kl, ")
    assert "by arm: candidates repaired (gap) on 8 fit windows, finalists" in protocol
    assert "on 32 fit windows, or none repaired, replay by" in protocol


def test_text_that_nothing_is_fitted_on_is_no_part_of_the_signature(
    workplace: Path, session: Session
) -> None:
    sizes = {"fit_tokens": 128, "finals_fit_tokens": 512}
    config = configured(workplace, calibration={"fit_text": "text.txt"} | sizes)
    other = Other(Documents.of(["mask " * 40] * 2 + ["keep " * 400], "own.txt"), 0.5)
    repaired = replace(session, config=config, fit_other=other)
    assert "fit" in repaired.signature(repaired.splits(0), 0)["data"]
    plain = replace(repaired, config=configured_plain(config))
    assert "fit" not in plain.signature(plain.splits(0), 0)["data"]


def test_a_comparison_judges_each_arm_with_its_own_weights(
    workplace: Path, session: Session, tmp_path: Path
) -> None:
    arms = {
        "cut": {"method": "windows"},
        "afterwards": {"method": "windows", "finish": "gap"},
        "inside": {"method": "windows", "repair": "gap"},
        "looked up": {"method": "windows", "repair": "table"},
    }
    plain = {"max_evaluations": 12, "finalists": 2}
    config = configured(
        workplace, search=plain, compare={"arms": arms, "seeds": [0], "cost_tokens": 1e9}
    )
    result = compare(config, tmp_path / "out", session=replace(session, config=config))
    found = {arm["name"]: arm for arm in result["arms"]}
    assert found["cut"]["repair"] is None
    assert found["cut"]["heldout_kl"] == found["cut"]["cut_kl"]
    for name in ("afterwards", "inside", "looked up"):
        assert found[name]["repair"]["kind"] == "gap"
        assert found[name]["heldout_kl"] < found[name]["cut_kl"]
    assert found["afterwards"]["cost_tokens"] < found["inside"]["cost_tokens"]
    table = compare_table(result)
    assert "KL as cut" in [str(column.header) for column in table.columns]
    narrow = Console(width=80, file=StringIO(), record=True)
    narrow.print(table)
    assert set(arms) <= set(re.findall(r"│ ([a-z ]+?) +│", narrow.export_text()))
    assert "Held-out KL as cut" in summary_table(result).columns


def test_the_export_carries_the_refitted_weights(finished: Path, tmp_path: Path) -> None:
    result, summary = export_run(finished, tmp_path / "model", measure=False)
    assert result.verification is not None
    assert result.verification.passed
    best = best_of(finished)
    assert summary["repair"] == best["repair"]
    written = load_file(result.path / "model.safetensors")
    refitted = load_file(finished / REPAIR)
    for name in best["repair"]["sites"]:
        assert any(torch.equal(refitted[f"{name}.weight"], weight) for weight in written.values())
    card = (result.path / "README.md").read_text()
    assert "## What was refitted" in card
    assert all(f"`{name}`" in card for name in best["repair"]["sites"])


def test_another_machine_exports_in_the_number_format_of_the_search(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"path": "model", "dtype": "auto", "device": "cpu"}
    monkeypatch.setattr(load, "_cpu_has_bfloat16", lambda: True)
    run = tmp_path / "run"
    search(configured(workplace, model=model), run)
    assert best_of(run)["signature"]["dtype"] == "bfloat16"
    monkeypatch.setattr(load, "_cpu_has_bfloat16", lambda: False)
    result, _ = export_run(run, tmp_path / "model", measure=False)
    written = load_file(result.path / "model.safetensors")
    assert {weight.dtype for weight in written.values()} == {torch.bfloat16}
    assert overfit(run, [256])["signature"]["dtype"] == "bfloat16"


def test_norms_behind_the_sublayers_are_refitted_and_exported(
    workplace: Path, tmp_path: Path
) -> None:
    save_tiny(workplace / "sandwich", "gemma2")
    model = {"path": "sandwich", "dtype": "float32", "device": "cpu"}
    run = tmp_path / "run"
    search(configured(workplace, model=model), run)
    sites = best_of(run)["repair"]["sites"]
    refitted = load_file(run / REPAIR)
    assert sites
    assert set(refitted) == {f"{name}.{of}" for name in sites for of in ("weight", "norm")}
    result, _ = export_run(run, tmp_path / "model", measure=False)
    assert result.verification is not None
    assert result.verification.passed
    written = load_file(result.path / "model.safetensors")
    for new in refitted.values():
        assert any(torch.equal(weight, new) for weight in written.values())
    card = (result.path / "README.md").read_text()
    assert "and the size of the norm" in card
    assert f"of {len(sites)} sublayer" in card


def test_damaged_weights_are_refused(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in (CONFIG, JOURNAL, BEST, REPAIR):
        (run / name).write_bytes((finished / name).read_bytes())
    (run / REPAIR).write_bytes((run / REPAIR).read_bytes()[:-1])
    with pytest.raises(RunDirectoryError, match="sha256"):
        export_run(run, tmp_path / "model", measure=False)
    (run / REPAIR).unlink()
    with pytest.raises(RunDirectoryError, match="can't be read"):
        export_run(run, tmp_path / "model", measure=False)


def test_what_cannot_be_repaired_is_refused_before_anything_is_created(
    workplace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    streamed = {"path": "model", "dtype": "float32", "device": "cpu", "streamed": True}
    with pytest.raises(ConfigError, match=r"search\.repair"):
        search(configured(workplace, model=streamed), out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (
            {"fit_tokens": 512, "finals_fit_tokens": 64},
            r"calibration\.finals_fit_tokens is 64, .* raise it to 80",
        ),
        ({"fit_tokens": 64}, r"calibration\.fit_tokens is 64, .* raise it to 80"),
        ({"finals_fit_tokens": 320_000}, "lower finals_fit_tokens, "),
        ({"fit_tokens": 320_000}, "lower fit_tokens, "),
        (
            {"fit_text": "text.txt", "fit_share": 0.01},
            r"calibration\.fit_share is 0\.01, which of the 8 windows of fit_tokens is none",
        ),
    ],
)
def test_fit_text_of_a_wrong_size_is_called_by_its_own_name(
    session: Session, workplace: Path, tmp_path: Path, calibration: dict[str, Any], message: str
) -> None:
    sizes = {"fit_tokens": 128, "finals_fit_tokens": 512} | calibration
    config = configured(workplace, calibration=sizes)
    changed = replace(session, config=config, fit_other=load_fit(config.calibration))
    with pytest.raises(InputError, match=message):
        search(config, tmp_path / "run", session=changed)
    assert not (tmp_path / "run").exists()


def test_a_limit_too_low_for_the_fits_of_the_finalists_is_refused_and_that_asked_for_is_kept(
    session: Session, workplace: Path, tmp_path: Path
) -> None:
    def run(limit: float, name: str) -> float:
        changes = {"max_evaluations": None, "cost_tokens": limit, "method": "windows"}
        config = configured(
            workplace,
            search=SEARCH | changes,
            calibration={"fit_tokens": 128, "finals_fit_tokens": 2048},
        )
        found = search(config, tmp_path / name, session=replace(session, config=config))
        return found.cost_tokens

    with pytest.raises(ConfigError, match=r"too little.*lower calibration\.finals_fit") as refused:
        run(100.0, "refused")
    asked = re.search(r"at least ([\d,]+)", str(refused.value))
    assert asked is not None
    least = float(asked[1].replace(",", ""))
    with pytest.raises(ConfigError, match="too little"):
        run(least - 1, "refused")
    assert run(least + 1, "kept") <= least + 1


def test_a_result_that_leans_toward_the_text_is_resumed_alike_and_says_so(
    workplace: Path, tmp_path: Path
) -> None:
    leaning = SEARCH | {"repair": "none", "toward_text": 2.0}
    config = configured(workplace, search=leaning)
    session = Session.open(config)
    run, plain = tmp_path / "run", tmp_path / "plain"
    search(config, run, session=session)
    best = best_of(run)
    assert (
        "finalists repaired (sequential, 2 nats toward the text)" in best["signature"]["protocol"]
    )
    again = tmp_path / "again"
    again.mkdir()
    (again / CONFIG).write_bytes((run / CONFIG).read_bytes())
    lines = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    (again / JOURNAL).write_bytes(b"".join(lines[: len(lines) // 2]))
    resume(again)
    for name in (BEST, REPAIR):
        assert (again / name).read_bytes() == (run / name).read_bytes()
    search(configured(workplace, search=SEARCH | {"repair": "none"}), plain)
    assert best_of(plain)["cost_tokens"] < best["cost_tokens"]
    assert (plain / REPAIR).read_bytes() != (run / REPAIR).read_bytes()
    export_run(run, tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert "moved toward what predicts that text by 2 nats to first order" in card


def test_leaning_without_a_repair_in_the_end_is_refused(workplace: Path) -> None:
    config = configured(workplace, search={"max_evaluations": 2, "toward_text": 1.0})
    with pytest.raises(ConfigError, match=r"toward_text is 1, but nothing is repaired .*finish"):
        Session.open(config)


def test_a_worker_that_leans_has_the_losses_of_this_process(workplace: Path) -> None:
    session = Session.open(configured(workplace))
    splits = session.splits(0)
    fit = {"repair": "sequential", "fit": splits.fit, "toward_text": 2.0}
    here = session.backend(splits.finals, 0, **fit)
    judged = ("kl", str(session.check.mode), session.config.calibration.batch_tokens)
    text = worker_text(splits.finals, *judged, session.config.objective.positions, 0, **fit)
    straight = worker_text(
        splits.finals,
        *judged,
        session.config.objective.positions,
        0,
        **(fit | {"toward_text": 0.0}),
    )
    assert text.name != straight.name
    threads = torch.get_num_threads()
    source = ModelSource(str(workplace / "model"), "float32", "cpu", None, False, threads)
    worker = Worker(source)
    masks = [session.space.dense, session.space.dense.without([2, 3])]
    found = [worker.run(each, 0, [mask.key for mask in masks]) for each in (text, straight)]
    assert [answer.error for answer in found] == [None, None]
    assert found[0].losses == here.run(0, masks).losses
    assert found[0].losses[0] == found[1].losses[0]
    assert found[0].losses[1] != found[1].losses[1]
