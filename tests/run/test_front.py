from __future__ import annotations

import json
import re
import signal
import time
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import Cli
from tests.processes import start_command
from tests.tiny_models import save_tiny
from tests.tiny_runs import workplace_config, write_config, write_text

from depthsearch.config import load_config
from depthsearch.errors import ConfigError, RunDirectoryError
from depthsearch.journal import read_journal, without_times
from depthsearch.model.load import load_model
from depthsearch.model.switches import masked
from depthsearch.report import write_report
from depthsearch.run.directory import BEST, CONFIG, FRONT, JOURNAL, REPORT
from depthsearch.run.figures import export_run
from depthsearch.run.front import find_point, parse_budget
from depthsearch.run.search import resume, search
from depthsearch.run.session import Session
from depthsearch.run.watching import RunState, Watcher
from depthsearch.space import Budget, Mask

BUDGETS: list[dict[str, Any]] = [{"keep_params": 0.85}, {"keep_kv_bytes": 0.5}]
SETTINGS: dict[str, Any] = {
    "space": {"packable": True},
    "front": {"budgets": BUDGETS},
    "search": {"method": "front", "max_evaluations": 60, "finalists": 3},
}


@pytest.fixture(scope="module")
def run(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over three budgets in two metrics."""
    out = tmp_path_factory.mktemp("fronts") / "run"
    search(workplace_config(workplace, **SETTINGS), out, finish=write_report)
    return out


def front_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / FRONT).read_text())
    return found


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_front_json_has_an_answer_for_every_budget(run: Path, session: Session) -> None:
    front, best = front_of(run), json.loads((run / BEST).read_text())
    points = front["points"]
    assert [point["point"] for point in points] == [1, 2, 3]
    assert [Budget.from_json(point["budget"]) for point in points] == [
        Budget("params", ratio=0.85, of="blocks"),
        Budget("params", ratio=0.7, of="blocks"),
        Budget("kv_bytes", ratio=0.5, of="blocks"),
    ]
    assert [point["own"] for point in points] == [False, True, False]
    costs = session.space.costs
    for point in points:
        mask = Mask.from_key(point["mask"])
        assert point["costs"] == {m: costs.cost(m, mask) for m in costs.metrics}
        assert point["cost"] == point["costs"][point["metric"]] <= point["cap"]
        assert point["dense_cost"] == costs.total(point["metric"])
        assert front["dense_costs"][point["metric"]] == point["dense_cost"]
        assert len(point["dropped"]) + len(point["kept"]) == len(mask)
        assert point["finals_loss"] <= point["baseline_finals_loss"]
    own = points[1]
    for key in ("mask", "origin", "loss", "finals_loss", "cost", "cap", "dropped"):
        assert own[key] == best[key]
    assert front["metrics"] == ["params", "kv_bytes"]
    told = {
        entry["mask"]: entry["loss"]
        for record in read_journal(run / JOURNAL)
        if record["op"] == "tell"
        for entry in record["evaluations"]
    }
    assert session.space.dense.key in {entry["mask"] for entry in front["archive"]}
    for entry in front["archive"]:
        assert entry["loss"] == told[entry["mask"]]


def test_the_finals_are_those_of_the_masked_model(
    run: Path, session: Session, workplace: Path
) -> None:
    config = workplace_config(workplace, **SETTINGS)
    here = replace(session, config=config)
    splits = here.splits(config.search.seed)
    _, finals = here.backends(splits, config.search.seed)
    for point in front_of(run)["points"]:
        mask = Mask.from_key(point["mask"])
        losses = [
            loss
            for batch in range(len(finals.sequences))
            for loss in finals.run(batch, [mask]).losses[0]
        ]
        assert point["finals_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-9)


def test_the_same_search_resumed_anywhere_writes_the_same(run: Path, tmp_path: Path) -> None:
    lines = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    whole = without_times(read_journal(run / JOURNAL))
    for count in (1, len(lines) // 2, len(lines) - 2, len(lines)):
        out = tmp_path / str(count)
        out.mkdir()
        (out / CONFIG).write_bytes((run / CONFIG).read_bytes())
        (out / JOURNAL).write_bytes(b"".join(lines[:count]) + b'{"op": "te')
        resume(out)
        assert without_times(read_journal(out / JOURNAL)) == whole
        assert (out / FRONT).read_bytes() == (run / FRONT).read_bytes()
        assert (out / BEST).read_bytes() == (run / BEST).read_bytes()


def test_streamed_weights_write_the_same(run: Path, workplace: Path, tmp_path: Path) -> None:
    config = workplace_config(workplace, **SETTINGS, model={"streamed": True, "host_gb": 0.001})
    search(config, tmp_path / "run")
    assert (tmp_path / "run" / FRONT).read_bytes() == (run / FRONT).read_bytes()


@pytest.mark.parametrize("chosen", [{"point": 1}, {"budget": "keep_kv_bytes=0.5"}, {}])
def test_each_point_is_exported_and_loads(
    run: Path, session: Session, tmp_path: Path, chosen: dict[str, Any]
) -> None:
    before = set(listing(run))
    out = tmp_path / "model"
    result, summary = export_run(run, out, measure=False, **chosen)
    number = {"point": 1, "budget": 3}[next(iter(chosen))] if chosen else 2
    point = front_of(run)["points"][number - 1]
    assert summary["mask"] == point["mask"]
    assert result.verification is not None
    assert result.verification.passed
    assert result.parameters == point["costs"]["params"]
    small = load_model(str(out), "float32", "cpu").model
    ids = session.splits(0).heldout[:2]
    with torch.no_grad():
        logits = small(input_ids=ids).logits
        with masked(session.loaded.model, session.anatomy, Mask.from_key(point["mask"])):
            expected = session.loaded.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    written = "export.json" if number == 2 else f"export-{number}.json"
    assert set(listing(run)) - before <= {written}
    assert json.loads((run / written).read_text())["mask"] == point["mask"]
    card = (out / "README.md").read_text()
    assert (f"--point {number}" in card) == bool(chosen)
    assert point["budget_text"] in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, None), "no point 4.*1: params at most 85 %.*3: kv_bytes"),
        ((None, "keep_params=0.5"), "no point at keep_params=0.5"),
    ],
)
def test_a_point_that_is_not_there_is_named(
    run: Path, arguments: tuple[int | None, str | None], message: str
) -> None:
    with pytest.raises(RunDirectoryError, match=message):
        find_point(run, *arguments)


@pytest.mark.parametrize(
    "text", ["keep_params", "keep_parms=0.8", "keep_params=80", "=", "of=model", "keep_params=[1"]
)
def test_a_budget_that_can_not_be_read_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--budget {text}: ")) as caught:
        parse_budget(text)
    assert "\n" not in str(caught.value)


def test_a_run_over_one_budget_has_no_points(workplace: Path, tmp_path: Path) -> None:
    config = workplace_config(workplace, search={"method": "front", "max_evaluations": 20})
    search(config, tmp_path / "run")
    assert not (tmp_path / "run" / FRONT).exists()
    with pytest.raises(RunDirectoryError, match="it searched one budget"):
        export_run(tmp_path / "run", tmp_path / "out", point=1)
    assert listing(tmp_path) == ["run"]


def test_repaired_points_bring_their_weights(workplace: Path, tmp_path: Path) -> None:
    calibration = {"fit_tokens": 256, "finals_fit_tokens": 256}
    changes = {**SETTINGS, "search": {**SETTINGS["search"], "finish": "gap"}}
    out = tmp_path / "run"
    search(workplace_config(workplace, **changes, calibration=calibration), out)
    points = front_of(out)["points"]
    for point in points:
        result, summary = export_run(
            out, tmp_path / str(point["point"]), measure=False, point=point["point"]
        )
        assert result.verification is not None
        assert result.verification.passed
        assert summary["repair"]["sha256"] == point["repair"]["sha256"]
        assert (out / point["repair"]["file"]).is_file()
    assert len({point["repair"]["file"] for point in points}) == len(
        {point["mask"] for point in points}
    )


def test_a_watcher_sees_the_best_loss_at_each_budget(run: Path) -> None:
    state = Watcher(run).look()
    assert isinstance(state, RunState)
    records = read_journal(run / JOURNAL)
    points = front_of(run)["points"]
    told = [e for r in records if r["op"] == "tell" for e in r["evaluations"]]
    final = {p["mask"] for r in records if r["op"] == "ask" for p in r["proposals"] if p["final"]}
    space = Session.open(load_config(run / CONFIG)).space
    for point, at in zip(points, space.points, strict=True):
        expected = min(
            e["loss"]
            for e in told
            if e["status"] == "ok" and e["mask"] in final and at.fits(Mask.from_key(e["mask"]))
        )
        assert state.front_losses[point["budget_text"]] == expected
    assert state.best_loss == state.front_losses[points[1]["budget_text"]]


class TestCommands:
    def test_front_lists_the_points(self, cli: Cli, run: Path) -> None:
        found = cli("front", run)
        assert found.code == 0
        assert ", own" in found.out
        for point in front_of(run)["points"]:
            assert f"{100 * point['cost'] / point['dense_cost']:.1f} %" in found.out
            assert f"{point['finals_loss']:.4f}" in found.out
        assert json.loads(cli("front", run, "--json").out) == front_of(run)

    def test_watch_shows_each_budget(self, cli: Cli, run: Path) -> None:
        assert "kv_bytes at most 50 %" in cli("watch", run, "--once").out

    def test_mistakes_are_one_line(self, cli: Cli, run: Path, tmp_path: Path) -> None:
        both = cli("export", run, tmp_path / "x", "--point", 1, "--budget", "keep_params=0.7")
        assert (both.code, "give one of them" in both.message) == (2, True)
        wrong = cli("export", run, tmp_path / "x", "--budget", "keep_params=0.1")
        assert (wrong.code, "choose one" in wrong.message) == (2, True)
        assert listing(tmp_path) == []

    def test_an_unfinished_run_has_no_front(self, cli: Cli, run: Path, tmp_path: Path) -> None:
        for name in (CONFIG, JOURNAL):
            (tmp_path / name).write_bytes((run / name).read_bytes())
        found = cli("front", tmp_path)
        assert (found.code, "depthsearch resume" in found.message) == (2, True)


def test_killed_and_resumed_it_comes_to_the_same(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama", blocks=6)
    write_text(tmp_path / "text.txt")
    write_config(
        tmp_path / "run.yaml",
        **{**SETTINGS, "search": {"method": "front", "max_evaluations": 150, "finalists": 3}},
        calibration={"select_tokens": 512, "batch_tokens": 32},
    )
    search(load_config(tmp_path / "run.yaml"), tmp_path / "whole")
    killed = tmp_path / "killed"
    running = start_command("search", "run.yaml", "--out", killed, cwd=tmp_path)
    goal = (tmp_path / "whole" / JOURNAL).stat().st_size // 3
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and running.poll() is None:
        if (killed / JOURNAL).is_file() and (killed / JOURNAL).stat().st_size > goal:
            break
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=60)
    assert not (killed / BEST).exists()
    assert not (killed / FRONT).exists()
    resume(killed)
    for name in (FRONT, BEST):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_report_shows_the_front(run: Path) -> None:
    page = unescape((run / REPORT).read_text())
    assert "Quality against cost" in page
    for point in front_of(run)["points"]:
        assert point["budget_text"] in page
    assert "depthsearch export RUN OUT --point NUMBER" in page
