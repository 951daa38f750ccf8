from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.commands import Cli
from tests.latency_tables import table_data, write_table
from tests.tiny_runs import write_config, write_workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, a text, a latency table written by hand and a run file that names it."""
    folder = tmp_path_factory.mktemp("place")
    write_workplace(folder)
    write_table(folder / "table.json", folder / "model")
    space = {
        "packable": True,
        "latency": "table.json",
        "budget": {"keep_latency": 0.75, "context_tokens": 64},
    }
    write_config(folder / "run.yaml", space=space, search={"method": "windows"})
    return folder


def test_a_table_is_written_and_shown(cli: Cli, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    found = cli(
        "latency", place / "model", "--out", out, "--context-tokens", 16, "--repeats", 3,
        "--dtype", "float32", "--device", "cpu", "--threads", 1,
    )  # fmt: skip
    assert found.code == 0, found.err
    table = json.loads(out.read_text())
    assert f"Table: {out}" in found.out
    assert f"{table['sites'][0]['ns'] / 1e6:.4g} ms" in found.out
    assert "One decoding step behind 16 tokens" in found.out
    assert "(additivity error)" in found.out
    assert "latency" in found.err
    assert "100 %" in found.err


def test_the_table_as_one_document(cli: Cli, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    found = cli(
        "latency", place / "model", "--out", out, "--context-tokens", 8, "--repeats", 2, "--json"
    )
    shown, written = json.loads(found.out), json.loads(out.read_text())
    assert {key: shown[key] for key in written} == written
    total = written["fixed"]["ns"] + sum(site["ns"] for site in written["sites"])
    assert shown["sum_ns"] == total
    assert shown["additivity_error"] == total / written["whole"]["ns"] - 1


def test_inspect_shows_it_beside_the_other_costs(cli: Cli, place: Path) -> None:
    table = ("--latency", place / "table.json", "--context-tokens", 64)
    found = cli("inspect", place / "model", *table)
    assert found.code == 0, found.err
    lines = found.out.splitlines()
    (total,) = [line for line in lines if "decoding step at 64 tokens" in line]
    assert [cell.strip() for cell in total.split("│")[2:5]] == ["18 ms", "16 ms", "2 ms"]
    rows = [line for line in lines if "decoder.0." in line]
    assert [row.split("│")[-2].strip() for row in rows] == ["1 ms", "3 ms"]
    shown = json.loads(cli("inspect", place / "model", *table, "--json").out)
    assert shown["latency"]["device_name"] == "a machine elsewhere"


def test_search_and_export_speak_of_milliseconds(cli: Cli, place: Path, tmp_path: Path) -> None:
    found = cli("search", place / "run.yaml", "--out", tmp_path / "run")
    assert found.code == 0, found.err
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    ms = best["cost"] / 1e6
    assert f"{ms:.4g} ms of 18 ms ({100 * ms / 18:.1f} %), cap 13.5 ms" in found.out
    found = cli("export", tmp_path / "run", tmp_path / "small", "--repeats", 1)
    assert found.code == 0, found.err
    measured = json.loads((tmp_path / "run" / "export.json").read_text())["latency"]
    said = (
        "Decoding step behind 64 tokens: predicted on a machine elsewhere "
        f"{100 * ms / 18:.1f} % of the dense model's ({ms:.4g} of 18 ms), measured "
        f"{100 * measured['measured_ratio']:.1f} %"
    )
    assert said in " ".join(found.out.split())
    assert cli("report", tmp_path / "run").code == 0
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Decoding step behind 64 tokens, measured" in report
    assert "Decoding step behind 64 tokens, predicted" in report


def test_mistakes_are_one_line(cli: Cli, place: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps(table_data()))
    run = ("search", place / "run.yaml", "--out", tmp_path / "run", "--set")
    cases = [
        (("latency", place / "model", "--out", foreign), "exists already and is never overwritten"),
        (("latency", place / "model", "--out", tmp_path / "t"), "lower context_tokens"),
        ((*run, "space.latency=null"), "keep_latency needs measured times"),
        ((*run, "space.latency=nowhere.json"), "nowhere.json: no such latency table"),
        ((*run, f"space.latency={foreign}"), "has the times of another model"),
        ((*run, f"space.latency={place / 'run.yaml'}"), "is no latency table"),
        ((*run, "space.budget={keep_latency: 0.75}"), "set it to 64 (in a run file space.budget."),
        ((*run, "space.budget={keep_latency: 1ms, context_tokens: 64}"), "costs 2 ms (11.1 %"),
    ]
    for arguments, message in cases:
        found = cli(*arguments)
        assert found.code == 2
        assert message in found.message
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.json"]
