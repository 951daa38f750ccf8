"""Pictures and words: what they say, and that drawing leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from depthsearch.report import comparison as arms_report
from depthsearch.report import tables, wording
from depthsearch.report.data import read_run
from depthsearch.report.drawing import CYCLE, canvas, picture, style_of
from depthsearch.report.figures import Strip, cost_picture, mask_picture, running_best
from depthsearch.space import Mask, SearchSpace, Site

WriteRun = Callable[..., Path]


def test_drawing_restores_every_setting(space: SearchSpace) -> None:
    before = dict(mpl.rcParams)
    mask = Mask.dropping(60, range(20, 34))
    drawn = mask_picture([Strip(mask, "Best", "loss 0.8")], space.sites, frozenset({0}))
    assert dict(mpl.rcParams) == before
    assert "Best drops blocks 10–16" in drawn.alt


def test_drawing_needs_no_pyplot() -> None:
    code = "import depthsearch.report, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_picture_of_very_many_dots_becomes_pixels() -> None:
    with canvas(4, 3) as figure:
        axis = figure.add_subplot()
        axis.plot([n % 997 for n in range(9000)], range(9000), linestyle="", marker="o")
        drawn = picture(figure, "dots")
    assert drawn.source.startswith("data:image/png;base64,")
    assert len(drawn.source) < 400_000


def test_the_running_best_only_falls() -> None:
    points = [(1.0, 3.0), (1.0, 2.5), (2.0, None), (2.0, 2.7), (4.0, 2.0), (3.0, 2.2)]
    assert running_best(points) == [(1.0, 2.5), (3.0, 2.2), (4.0, 2.0)]
    assert running_best([]) == []


def test_the_cost_picture_names_the_best_loss(tmp_path: Path, write_run: WriteRun) -> None:
    run = read_run(write_run(tmp_path / "run", generations=2))
    best = run.ranked[0].evaluation.loss
    assert f"the best reaches {best:.4f} nats" in cost_picture(run).alt


def test_families_without_a_style_get_different_ones() -> None:
    known = ["windows", "tpe", "cma", "greedy"]
    assert style_of("tpe", known) == CYCLE[0]
    assert style_of("cma", known) == CYCLE[1]
    styles = [style_of(name, known) for name in known]
    assert len({marker for _, marker in styles}) >= 3


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (107_938_368, "params", "107.9 M"),
        (219_500_000, "bytes", "219.5 MB"),
        (18_432, "kv_bytes", "18.43 kB"),
        (213_000_000, "flops", "213 MFLOP"),
        (293_874_000, "latency", "293.9 ms"),
        (2_100_000_000, "latency", "2,100 ms"),
        (46, "sites", "46"),
        (999, "bytes", "999 B"),
        (8_030_261_248, "params", "8.03 G"),
        (0, "", "0"),
    ],
)
def test_amounts_carry_their_unit(value: int, metric: str, text: str) -> None:
    assert wording.amount(value, metric).replace(wording.SPACE, " ") == text


@pytest.mark.parametrize(
    ("dropped", "text"),
    [
        ((), "nothing"),
        (range(24, 38), "blocks 12–18"),
        ((8, 9, 24), "attention 4, 12; FFN 4"),
        (range(25, 39), "attention 13–19; FFN 12–18"),
        ((59,), "FFN 29"),
    ],
)
def test_masks_read_as_stretches(space: SearchSpace, dropped: range, text: str) -> None:
    assert wording.stretches(Mask.dropping(60, dropped), space.sites) == text


def test_words_for_losses_and_times() -> None:
    assert wording.loss(None) == wording.NONE
    assert wording.loss(0.83051, 0.0213) == "0.8305 ± 0.0213"
    assert wording.signed(-0.12) == f"{wording.MINUS}0.1200"
    assert wording.signed(0.12) == "+0.1200"
    assert [wording.duration(s) for s in (0.52, 59.6, 233.4, 7325)] == [
        "0.5 s", "1 min 0 s", "3 min 53 s", "2 h 2 min",
    ]  # fmt: skip
    assert wording.share(1, 0) == wording.NONE
    assert wording.shorten("a\nb" + "c" * 50, 10) == "a bcccccc…"
    assert wording.metric_name("kv_bytes", inside=True) == "KV cache per token"
    assert wording.metric_name("params", inside=True) == "parameters"


def test_exported_models_are_set_against_the_dense_one(comparison: dict[str, Any]) -> None:
    table = tables.exported(comparison["export"])
    assert table is not None
    assert table.columns == ("", "dense", "pruned", "÷ dense")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["Held-out perplexity"] == ("14.7", "35.6", "2.42×")
    assert rows["Decode, tokens/s"][2] == "1.27×"
    assert rows["Peak memory"][1:] == (wording.NONE, wording.NONE)


def test_a_decoding_step_is_shown_as_measured_and_as_predicted(
    comparison: dict[str, Any],
) -> None:
    latency = {
        "table": {"context_tokens": 2048},
        "measured_ms": {"dense": 546.25, "pruned": 403.7},
        "predicted_ms": {"dense": 391.8, "pruned": 287.8},
        "measured_ratio": 403.7 / 546.25,
        "predicted_ratio": 287.8 / 391.8,
    }
    plain = tables.exported(comparison["export"])
    table = tables.exported({**comparison["export"], "latency": latency})
    assert plain is not None
    assert table is not None
    assert table.rows[:-2] == plain.rows
    space = wording.SPACE
    assert table.rows[-2:] == (
        (
            "Decoding step behind 2,048 tokens, measured",
            f"546.2{space}ms",
            f"403.7{space}ms",
            "0.74×",
        ),
        (
            "Decoding step behind 2,048 tokens, predicted",
            f"391.8{space}ms",
            f"287.8{space}ms",
            "0.73×",
        ),
    )


def test_the_summary_is_ordered_by_held_out_loss(comparison: dict[str, Any]) -> None:
    rows = arms_report.summary_table(comparison).rows
    assert rows[0][0] == "dense model"
    figures = [float(row[2]) for row in rows[1:]]
    assert figures == sorted(figures)


def test_templates_are_part_of_the_package() -> None:
    names = {entry.name for entry in (files("depthsearch.report") / "templates").iterdir()}
    pages = {"run.html.j2", "compare.html.j2", "calibration.html.j2"}
    assert names == {"page.html.j2", "macros.html.j2"} | pages


def test_stretches_name_the_stack_where_there_are_several() -> None:
    layout = [(stack, block) for stack in ("encoder", "decoder") for block in range(3)]
    sites = tuple(
        Site(2 * n + part, stack, block, kind)
        for n, (stack, block) in enumerate(layout)
        for part, kind in enumerate(("attention", "ffn"))
    )
    mask = Mask.dropping(12, [2, 3, 6, 10, 11])
    assert (
        wording.stretches(mask, sites) == "encoder block 1; decoder attention 0, 2; decoder FFN 2"
    )
