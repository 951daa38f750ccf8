"""One search over pairs of budgets of two costs, from the run file to an exported point."""

from __future__ import annotations

import itertools
import json
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.commands import Cli
from tests.tiny_runs import workplace_config

from depthsearch.errors import BudgetError, ConfigError, RunDirectoryError
from depthsearch.journal import read_journal, without_times
from depthsearch.model.load import load_model
from depthsearch.model.switches import masked
from depthsearch.report import write_report
from depthsearch.run.directory import BEST, CONFIG, FRONT, JOURNAL, REPORT
from depthsearch.run.figures import export_run
from depthsearch.run.front import find_point
from depthsearch.run.search import resume, search
from depthsearch.run.session import Session
from depthsearch.space import Budget, Mask

SETTINGS: dict[str, Any] = {
    "space": {"protect": ["first"]},
    "front": {
        "budgets": [{"keep_params": 0.85}],
        "second": [{"keep_kv_bytes": 0.75}, {"keep_kv_bytes": 0.5}, {"keep_kv_bytes": 0.01}],
    },
}
PACKABLE = {"space": {"packable": True, "protect": ["first"]}}
METHODS: dict[str, dict[str, Any]] = {
    "front": {"method": "front", "max_evaluations": 90, "finalists": 3},
    "nsga2": {
        "method": "optuna",
        "max_evaluations": 90,
        "finalists": 3,
        "options": {"sampler": "nsga2"},
    },
}


@pytest.fixture(scope="module", params=METHODS)
def run(
    request: pytest.FixtureRequest, workplace: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run over two budgets of parameters and two of the cache, of each method."""
    out = tmp_path_factory.mktemp("pairs") / "run"
    config = workplace_config(workplace, **SETTINGS, search=METHODS[request.param])
    search(config, out, finish=write_report)
    return out


@pytest.fixture(scope="module")
def packable(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with masks that can be exported."""
    out = tmp_path_factory.mktemp("packable") / "run"
    config = workplace_config(workplace, **{**SETTINGS, **PACKABLE}, search=METHODS["front"])
    search(config, out)
    return out


def front_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / FRONT).read_text())
    return found


def pair(params: float, cache: float) -> Budget:
    also = Budget("kv_bytes", ratio=cache, of="blocks")
    return Budget("params", ratio=params, of="blocks", also=also)


def test_front_json_answers_every_pair_that_can_be_met(run: Path, session: Session) -> None:
    front, costs = front_of(run), session.space.costs
    assert [Budget.from_json(point["budget"]) for point in front["points"]] == [
        pair(0.85, 0.75),
        pair(0.85, 0.5),
        Budget("params", ratio=0.7, of="blocks"),
        pair(0.7, 0.75),
        pair(0.7, 0.5),
    ]
    for point in front["points"]:
        mask = Mask.from_key(point["mask"])
        assert 0 in mask.kept
        assert 1 in mask.kept
        assert point["costs"] == {m: costs.cost(m, mask) for m in costs.metrics}
        assert len(point["limits"]) == len(Budget.from_json(point["budget"]).parts)
        for limit in point["limits"]:
            assert point["costs"][limit["metric"]] <= limit["cap"]
            assert limit["dense_cost"] == costs.total(limit["metric"])
        assert point["finals_loss"] <= point["baseline_finals_loss"]
    assert [point["own"] for point in front["points"]] == [False, False, True, False, False]
    assert json.loads((run / BEST).read_text())["mask"] == front["points"][2]["mask"]
    assert front["metrics"] == ["params", "kv_bytes"]


def test_what_can_not_be_met_is_named(run: Path, cli: Cli) -> None:
    left_out = front_of(run)["left_out"]
    assert [Budget.from_json(entry["budget"]) for entry in left_out] == [
        pair(0.7, 0.01),
        pair(0.85, 0.01),
    ]
    assert all("kv_bytes at most 1 % of the" in entry["reason"] for entry in left_out)
    shown = " ".join(cli("front", run).out.split())
    assert "left out, since no mask meets them" in shown
    page = unescape((run / REPORT).read_text())
    assert all(entry["budget_text"] in page for entry in left_out)
    assert "A line is the lowest loss found" in page
    assert "kv_bytes at most 75 %" in page


def test_the_hypervolume_is_that_of_the_archive(run: Path) -> None:
    """Counted over the cells of the grid that all values span."""
    front = front_of(run)
    reference = front["hypervolume"]["reference"]
    assert reference["loss"] == max(point["loss"] for point in front["points"])
    names = ["loss", "params", "kv_bytes"]
    rows = np.array(
        [[e["loss"], *(e["costs"][m] for m in names[1:])] for e in front["archive"]], dtype=float
    ) / [reference[name] for name in names]
    assert len(rows) > 3
    edges = [np.unique([*(c for c in column if c < 1), 1.0]) for column in rows.T]
    volume = 0.0
    for place in itertools.product(*(range(len(edge) - 1) for edge in edges)):
        low = [edge[i] for edge, i in zip(edges, place, strict=True)]
        if (rows <= low).all(axis=1).any():
            widths = [edge[i + 1] - edge[i] for edge, i in zip(edges, place, strict=True)]
            volume += float(np.prod(widths))
    assert front["hypervolume"]["share"] == pytest.approx(volume, rel=1e-9)
    assert 0 < volume < 1


def test_the_same_search_resumed_anywhere_writes_the_same(run: Path, tmp_path: Path) -> None:
    lines = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    whole = without_times(read_journal(run / JOURNAL))
    for count in (1, len(lines) // 2, len(lines) - 2):
        out = tmp_path / str(count)
        out.mkdir()
        (out / CONFIG).write_bytes((run / CONFIG).read_bytes())
        (out / JOURNAL).write_bytes(b"".join(lines[:count]) + b'{"op": "te')
        resume(out)
        assert without_times(read_journal(out / JOURNAL)) == whole
        assert (out / FRONT).read_bytes() == (run / FRONT).read_bytes()


@pytest.mark.parametrize(
    ("chosen", "number"),
    [({"point": 2}, 2), ({"budget": "keep_kv_bytes=0.5, keep_params=0.7"}, 5)],
)
def test_a_pair_is_exported_and_loads(
    packable: Path, session: Session, tmp_path: Path, chosen: dict[str, Any], number: int
) -> None:
    point = front_of(packable)["points"][number - 1]
    result, summary = export_run(packable, tmp_path / "model", measure=False, **chosen)
    assert summary["mask"] == point["mask"]
    assert result.parameters == point["costs"]["params"]
    small = load_model(str(tmp_path / "model"), "float32", "cpu").model
    ids = session.splits(0).heldout[:2]
    with torch.no_grad():
        logits = small(input_ids=ids).logits
        with masked(session.loaded.model, session.anatomy, Mask.from_key(point["mask"])):
            expected = session.loaded.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"Budget: {point['budget_text']}" in card


@pytest.mark.parametrize("text", ["keep_params=0.85", "keep_params=0.7,keep_kv_bytes=0.01"])
def test_a_pair_that_is_not_there_is_named(run: Path, text: str) -> None:
    with pytest.raises(RunDirectoryError, match=rf"no point at {text} \(1: params .* and kv_byt"):
        find_point(run, None, text)


def test_the_first_cost_alone_is_the_own_point(run: Path) -> None:
    assert find_point(run, None, "keep_params=0.7")["point"] == 3
    with pytest.raises(ConfigError, match="--budget keep_kv: expected key=value"):
        find_point(run, None, "keep_params=0.7,keep_kv")


def test_a_grid_without_a_pair_that_can_be_met_is_refused(workplace: Path, tmp_path: Path) -> None:
    changes = {**SETTINGS, "front": {"second": [{"keep_kv_bytes": 0.01}]}}
    config = workplace_config(workplace, **changes, search=METHODS["front"])
    with pytest.raises(BudgetError, match="no pair of budgets of the front can be met"):
        search(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_samplers_that_weigh_one_number_are_refused_before_a_run_begins(
    workplace: Path, tmp_path: Path
) -> None:
    changes = {**METHODS["nsga2"], "options": {"sampler": "cmaes"}}
    with pytest.raises(ConfigError, match="'cmaes' minimizes one number"):
        search(workplace_config(workplace, **SETTINGS, search=changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
