from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.latency_tables import ATTENTION, FFN, FIXED, table_data, write_table
from tests.tiny_models import save_tiny
from tests.tiny_runs import workplace_config, write_workplace

from depthsearch.config import RunConfig, load_config
from depthsearch.errors import BudgetError, InputError, JournalError, ModelError, StorageError
from depthsearch.journal import read_journal, without_times
from depthsearch.model.load import fingerprint
from depthsearch.run.compare import compare
from depthsearch.run.directory import BEST, CONFIG, FRONT, JOURNAL
from depthsearch.run.figures import export_run
from depthsearch.run.inspection import inspect_model
from depthsearch.run.latency import torch_threads, write_latency
from depthsearch.run.latency_table import read_latency
from depthsearch.run.search import resume, search
from depthsearch.run.session import Session

DENSE = 4 * (ATTENTION + FFN) + FIXED
AT = {"context_tokens": 64}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, a text, and a latency table written by hand beside them."""
    folder = tmp_path_factory.mktemp("place")
    write_workplace(folder)
    write_table(folder / "table.json", folder / "model")
    return folder


def config(place: Path, **changes: Any) -> RunConfig:
    """A run at a latency budget; the space is packable, so that the result can be exported."""
    space = {
        "granularity": "sublayer",
        "packable": True,
        "latency": "table.json",
        "budget": {"keep_latency": 0.75, **AT},
    } | changes.pop("space", {})
    return workplace_config(place, space=space, **changes)


def cost(mask: str) -> int:
    """What a mask costs by the table, site by site."""
    kept = [FFN if place % 2 else ATTENTION for place, k in enumerate(mask) if k == "1"]
    return sum(kept) + FIXED


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search at three quarters of the latency."""
    out = tmp_path_factory.mktemp("finished") / "run"
    search(config(place), out)
    return out


class TestMeasuring:
    def test_a_table_is_measured_and_read_again(self, place: Path, tmp_path: Path) -> None:
        out = tmp_path / "new" / "table.json"
        threads = torch.get_num_threads()
        stages: list[tuple[str, int, int]] = []
        found = write_latency(
            str(place / "model"),
            out,
            context_tokens=16,
            repeats=4,
            threads=2,
            dtype="float32",
            device="cpu",
            on_stage=lambda *call: stages.append(call),
        )
        assert torch.get_num_threads() == threads
        assert stages[-1] == ("latency", 7, 7)
        read = read_latency(out)
        assert read is not None
        table, about = read.table, read.table.signature
        assert table.model_dump(mode="json") == json.loads(out.read_text())
        assert {name: found[name] for name in json.loads(out.read_text())} == json.loads(
            out.read_text()
        )
        assert (about.threads, about.context_tokens, about.repeats) == (2, 16, 4)
        assert (about.dtype, about.device, about.model_class) == (
            "float32", "cpu", "LlamaForCausalLM",
        )  # fmt: skip
        assert about.model.source == "model"
        assert about.model.fingerprint == fingerprint(place / "model")
        assert about.device_name
        costs = table.costs(Session.open(config(place)).anatomy.sites)
        assert all(ns > 0 for ns in (*costs.sites, costs.fixed))
        assert len(set(costs.sites)) == 2
        assert costs.sites == costs.sites[:2] * 4
        total = costs.fixed + sum(costs.sites)
        assert found["sum_ns"] == total
        assert found["additivity_error"] == total / table.whole.ns - 1

    def test_parallel_blocks_share_their_norm(self, tmp_path: Path) -> None:
        model = save_tiny(tmp_path / "model", "cohere", blocks=2)
        write_latency(str(model), tmp_path / "t.json", context_tokens=8, repeats=2)
        found = inspect_model(str(model), context_tokens=8, latency=tmp_path / "t.json")
        times = found["totals"]["latency"]
        parts = sum(site["latency"] for site in found["sites"])
        assert times["blocks"] > parts
        assert times["blocks"] + times["outside_blocks"] == times["model"]

    def test_nothing_is_overwritten(self, place: Path, tmp_path: Path) -> None:
        mine = tmp_path / "mine.json"
        mine.write_text("mine")
        with pytest.raises(InputError, match="exists already and is never overwritten"):
            write_latency(str(place / "model"), mine)
        assert mine.read_text() == "mine"

    def test_where_nothing_can_be_written_nothing_is_measured(
        self, place: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("no folder")
        stages: list[str] = []
        with pytest.raises(StorageError, match=r"cannot write into .*file: choose another"):
            write_latency(
                str(place / "model"),
                tmp_path / "file" / "table.json",
                **AT,
                on_stage=lambda name, done, total: stages.append(name),
            )
        assert stages == []

    def test_a_failed_measurement_leaves_nothing(self, place: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="exceed the model's 128 positions"):
            write_latency(str(place / "model"), tmp_path / "a" / "table.json")
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(InputError, match="threads is 0"), torch_threads(0):
            pass


class TestInspecting:
    def test_the_table_joins_the_other_costs(self, place: Path) -> None:
        path = place / "table.json"
        found = inspect_model(str(place / "model"), **AT, latency=path)  # type: ignore[arg-type]
        assert found["totals"]["latency"] == {
            "model": DENSE, "blocks": DENSE - FIXED, "outside_blocks": FIXED,
        }  # fmt: skip
        assert [site["latency"] for site in found["sites"]] == [ATTENTION, FFN] * 4
        assert found["latency"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_other_tables_are_refused(self, place: Path, tmp_path: Path) -> None:
        (tmp_path / "t.json").write_text(json.dumps(table_data()))
        with pytest.raises(ModelError, match="another model"):
            inspect_model(str(place / "model"), context_tokens=64, latency=tmp_path / "t.json")
        with pytest.raises(BudgetError, match="context of 64 tokens, but context_tokens is 2048"):
            inspect_model(str(place / "model"), latency=place / "table.json")


class TestSearching:
    def test_the_result_keeps_the_budget_of_the_table(self, finished: Path, place: Path) -> None:
        best = json.loads((finished / BEST).read_text())
        assert (best["metric"], best["dense_cost"], best["cap"]) == ("latency", DENSE, 13_500_000)
        assert best["cost"] == cost(best["mask"]) <= 13_500_000
        assert best["budget_text"] == "latency at most 75 % of the dense model"
        pairs = [
            best["mask"][:a] + "1" + best["mask"][a + 1 : b] + "1" + best["mask"][b + 1 :]
            for a, b in itertools.combinations(range(8), 2)
            if best["mask"][a] == best["mask"][b] == "0"
        ]
        packable = [m for m in pairs if all(len(run) % 2 == 0 for run in m.split("1"))]
        assert packable
        assert all(cost(mask) > 13_500_000 for mask in packable)
        digest = hashlib.sha256((place / "table.json").read_bytes()).hexdigest()
        assert best["signature"]["latency"]["sha256"] == digest

    def test_the_journal_names_the_table_without_its_folder(self, finished: Path) -> None:
        start = read_journal(finished / JOURNAL)[0]
        assert start["config"]["space"]["latency"] == "table.json"
        assert start["space"]["costs"]["latency"]["sites"] == [ATTENTION, FFN] * 4

    def test_a_search_is_the_same_again_and_resumed(
        self, finished: Path, place: Path, tmp_path: Path
    ) -> None:
        search(config(place), tmp_path / "again")
        journal = without_times(read_journal(finished / JOURNAL))
        assert without_times(read_journal(tmp_path / "again" / JOURNAL)) == journal
        lines = (tmp_path / "again" / JOURNAL).read_text().splitlines(keepends=True)
        (tmp_path / "again" / JOURNAL).write_text("".join(lines[:3]))
        (tmp_path / "again" / BEST).unlink()
        resume(tmp_path / "again")
        assert without_times(read_journal(tmp_path / "again" / JOURNAL)) == journal
        assert (tmp_path / "again" / BEST).read_text() == (finished / BEST).read_text()

    def test_another_table_does_not_continue_the_search(self, place: Path, tmp_path: Path) -> None:
        table = write_table(tmp_path / "other.json", place / "model")
        here = config(place, space={"latency": str(table)}, search={"max_evaluations": 10})
        search(here, tmp_path / "run")
        journal = (tmp_path / "run" / JOURNAL).read_bytes()
        write_table(table, place / "model", repeats=51)
        with pytest.raises(JournalError, match=r"signature\.latency\.sha256"):
            resume(tmp_path / "run")
        table.unlink()
        with pytest.raises(InputError, match="no such latency table"):
            resume(tmp_path / "run")
        assert (tmp_path / "run" / JOURNAL).read_bytes() == journal

    @pytest.mark.parametrize("method", ["greedy", "windows", "additive", "random", "surrogate"])
    def test_methods_count_in_it(self, place: Path, tmp_path: Path, method: str) -> None:
        here = config(place, space={"packable": False}, search={"method": method})
        outcome = search(here, tmp_path / "run")
        key = outcome.best.key
        assert cost(key) <= 13_500_000
        for index in outcome.best.dropped:
            assert cost(key[:index] + "1" + key[index + 1 :]) > 13_500_000

    def test_nothing_is_created_for_the_table_of_another_model(
        self, place: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "t.json").write_text(json.dumps(table_data()))
        with pytest.raises(ModelError, match="another model"):
            search(config(place, space={"latency": str(tmp_path / "t.json")}), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_other_budgets_show_it_too(self, place: Path, tmp_path: Path) -> None:
        space = {"budget": {"drop_blocks": 1, **AT}, "granularity": "block", "packable": False}
        search(config(place, space=space, search={"method": "windows"}), tmp_path / "run")
        start = read_journal(tmp_path / "run" / JOURNAL)[0]
        assert start["space"]["costs"]["latency"]["fixed"] == FIXED


def test_a_front_of_latencies_and_parameters(place: Path, tmp_path: Path) -> None:
    budgets = [{"keep_latency": "11ms"}, {"keep_params": 0.8}]
    here = config(place, search={"method": "front"}, front={"budgets": budgets})
    search(here, tmp_path / "run")
    front = json.loads((tmp_path / "run" / FRONT).read_text())
    assert front["metrics"] == ["latency", "params"]
    caps = {point["budget_text"]: point["cap"] for point in front["points"]}
    assert caps["latency at most 11 ms"] == 11_000_000
    for point in front["points"]:
        assert point["costs"]["latency"] == cost(point["mask"])
        if point["metric"] == "latency":
            assert cost(point["mask"]) == point["cost"] <= point["cap"]


def test_arms_are_compared_at_latencies(place: Path, tmp_path: Path) -> None:
    here = config(
        place,
        compare={
            "arms": {"windows": {"method": "windows"}, "greedy": {"method": "greedy"}},
            "seeds": [0],
            "budgets": [{"keep_latency": 0.8, **AT}, {"keep_latency": "12 ms", **AT}],
        },
    )
    result = compare(here, tmp_path / "out")
    assert [part["budget_text"] for part in result["budgets"]] == [
        "latency at most 80 % of the dense model", "latency at most 12 ms",
    ]  # fmt: skip
    runs = sorted(path.name for path in (tmp_path / "out" / "arms").iterdir())
    assert runs == [
        f"{arm}-keep_latency-{amount}-seed0"
        for arm in ("greedy", "windows")
        for amount in ("0.8", "12ms")
    ]
    for name, cap in zip(runs, (14_400_000, 12_000_000) * 2, strict=True):
        best = json.loads((tmp_path / "out" / "arms" / name / BEST).read_text())
        assert cost(best["mask"]) == best["cost"] <= best["cap"] == cap


def test_an_export_sets_the_prediction_beside_the_clock(finished: Path, tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    _, summary = export_run(
        finished, tmp_path / "small", repeats=1, on_stage=lambda *call: stages.append(call)
    )
    found, mask = summary["latency"], json.loads((finished / BEST).read_text())["mask"]
    assert json.loads((finished / "export.json").read_text())["latency"] == found
    assert found["predicted_ms"] == {"dense": 18.0, "pruned": cost(mask) / 1e6}
    assert found["predicted_ratio"] == cost(mask) / DENSE
    measured = found["measured_ms"]
    assert found["measured_ratio"] == pytest.approx(measured["pruned"] / measured["dense"])
    for name, (low, high) in found["quartiles_ms"].items():
        assert 0 < low <= measured[name] <= high
    assert (found["table"]["device_name"], found["repeats"]) == ("a machine elsewhere", 10)
    assert found["device_name"] != "a machine elsewhere"
    assert stages[-1] == ("decoding steps", 13, 13)
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"decoding step behind 64 tokens, ms, predicted | 18 | {cost(mask) / 1e6:.4g} |" in card


def test_the_table_is_found_beside_the_run_file(place: Path, finished: Path) -> None:
    assert config(place).space.latency == str(place / "table.json")
    assert load_config(finished / CONFIG).space.latency == str(place / "table.json")
