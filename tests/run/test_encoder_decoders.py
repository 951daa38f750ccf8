"""Whole runs of encoder-decoders: searched, repaired, compared, exported, or refused in words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import ENCODER_DECODER_TYPES, paired_ids, save_tiny, tiny_model
from tests.tiny_runs import WORDS, workplace_config, write_config
from transformers import AutoModelForSeq2SeqLM

from depthsearch.config import load_config
from depthsearch.errors import ConfigError, InputError, UnsupportedModelError
from depthsearch.evaluation.turns import Repair
from depthsearch.evaluation.worker import ModelSource, Worker
from depthsearch.journal import read_journal, without_times
from depthsearch.model.load import load_model
from depthsearch.model.packing import pack, unpack
from depthsearch.run.calibration_check import check_calibration
from depthsearch.run.compare import compare
from depthsearch.run.directory import BEST, JOURNAL
from depthsearch.run.evaluating import Targets, evaluate_checkpoint
from depthsearch.run.feeding import read_asked
from depthsearch.run.figures import export_run
from depthsearch.run.generation import GenerateOptions, generate
from depthsearch.run.inspection import inspect_model
from depthsearch.run.latency import write_latency
from depthsearch.run.overfit import overfit
from depthsearch.run.search import resume, search
from depthsearch.run.session import Session
from depthsearch.run.spaces import protected_sites
from depthsearch.run.workers import worker_text
from depthsearch.space import Mask

PAIRS: dict[str, Any] = {
    "text": "pairs.jsonl",
    "column": "source",
    "target_column": "target",
    "fit_tokens": 400,
    "finals_fit_tokens": 640,
}


def write_pairs(path: Path, count: int = 120) -> Path:
    """Sources of three to twelve random words, with the same words from behind as targets."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(3, 12))
        rows.append({"source": " ".join(words), "target": " ".join(words[::-1])})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5, pairs and a run file."""
    found = tmp_path_factory.mktemp("workplace")
    save_tiny(found / "model", "t5")
    write_pairs(found / "pairs.jsonl")
    write_config(found / "run.yaml", calibration=PAIRS)
    return found


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of masks that drop whole blocks, whose result is repaired."""
    out = tmp_path_factory.mktemp("runs") / "run"
    changes = {
        "space": {"granularity": "block"},
        "search": {"finish": "sequential"},
        "objective": {"max_new_tokens": 8},
    }
    search(config_of(folder, **changes), out)
    return out


def config_of(folder: Path, **changes: Any) -> Any:
    """The run file with some sections changed."""
    changes["calibration"] = PAIRS | changes.get("calibration", {})
    return workplace_config(folder, **changes)


def journal_of(run: Path) -> str:
    return without_times(read_journal(run / JOURNAL))


@pytest.mark.parametrize("method", ["greedy", "surrogate", "mcts"])
def test_methods_search_both_stacks(folder: Path, tmp_path: Path, method: str) -> None:
    search(config_of(folder, search={"method": method, "max_evaluations": 90}), tmp_path / "run")
    best = json.loads((tmp_path / "run" / BEST).read_text())
    assert best["cost"] <= best["cap"]
    assert len(best["mask"]) == 17


@pytest.mark.parametrize("repair", ["none", "sequential"])
def test_a_search_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path, repair: str) -> None:
    config = config_of(folder, search={"repair": repair, "max_evaluations": 25})
    search(config, tmp_path / "whole")
    lines = (tmp_path / "whole" / JOURNAL).read_text().splitlines(keepends=True)
    search(config, tmp_path / "cut")
    (tmp_path / "cut" / BEST).unlink()
    (tmp_path / "cut" / JOURNAL).write_text("".join(lines[: len(lines) // 2]))
    resume(tmp_path / "cut")
    assert journal_of(tmp_path / "cut") == journal_of(tmp_path / "whole")
    assert (tmp_path / "cut" / BEST).read_bytes() == (tmp_path / "whole" / BEST).read_bytes()


def test_masks_are_judged_by_what_they_write(folder: Path, tmp_path: Path) -> None:
    objective = {"kind": "chrf", "max_new_tokens": 8}
    settings = {"method": "windows", "max_evaluations": 8}
    search(config_of(folder, objective=objective, search=settings), tmp_path / "run")
    best = json.loads((tmp_path / "run" / BEST).read_text())
    assert 0 < best["loss"] <= 100
    assert "chrF" in best["signature"]["metric"]
    assert "'target'" in best["signature"]["protocol"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("repair", ["none", "table", "gap"])
def test_a_worker_has_the_losses_of_this_process(
    folder: Path, repair: Repair, packed: bool
) -> None:
    session = Session.open(load_config(folder / "run.yaml"))
    splits = session.splits(0, 400)
    here = session.backend(splits.select, 0, repair, splits.fit)
    judged = ("kl", str(session.check.mode), 64, session.config.objective.positions, 0)
    text = worker_text(splits.select, *judged, repair=repair, fit=splits.fit)
    threads = torch.get_num_threads()
    source = ModelSource(str(folder / "model"), "float32", "cpu", None, False, threads)
    worker = Worker(source, pack(session.loaded.model) if packed else None)
    masks = [session.space.dense, Mask.dropping(17, [2, 3, 11]), Mask.dropping(17, range(8, 14))]
    for batch in range(len(here.sequences)):
        found = worker.run(text, batch, [mask.key for mask in masks])
        assert found.error is None
        assert found.losses == here.run(batch, masks).losses


@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_a_packed_model_computes_the_same(model_type: str) -> None:
    model = tiny_model(model_type, 3, torch.bfloat16)
    again = unpack(pack(model))
    read, written = paired_ids().chunk(2, dim=1)
    with torch.no_grad():
        one, other = (
            m(input_ids=read, decoder_input_ids=written, use_cache=False).logits
            for m in (model, again)
        )
    assert torch.equal(one, other)


def test_a_result_is_exported_and_loads_in_transformers(finished: Path, tmp_path: Path) -> None:
    result, summary = export_run(finished, tmp_path / "small")
    best = json.loads((finished / BEST).read_text())
    assert best["repair"] is not None
    assert summary["verification"]["passed"]
    assert summary["verification"]["generation_equal"]
    assert summary["unmeasured"] is None
    dense, pruned = summary["rows"]
    assert pruned["perplexity"] > 1
    assert pruned["parameters"] == best["cost"] < dense["parameters"]
    assert pruned["kv_bytes_per_token"] <= dense["kv_bytes_per_token"] == 4 * 64 * 4 * 3
    assert 0 <= pruned["chrf"] <= 100
    assert (
        "16 texts of at most 8 tokens, greedy, against their references" in dense["chrf_protocol"]
    )
    small = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "small")
    assert small.num_parameters() == result.parameters == best["cost"]
    card = (tmp_path / "small" / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM" in card
    assert "chrF++ of texts written" in card
    described = inspect_model(str(tmp_path / "small"))
    assert described["totals"]["params"]["model"] == best["cost"]


def test_arms_are_compared(folder: Path, tmp_path: Path) -> None:
    arms = {"greedy": {"method": "greedy"}, "windows": {"method": "windows"}}
    section = {"cost_tokens": "greedy", "seeds": [0], "anytime": 0, "arms": arms}
    config = config_of(folder, compare=section, search={"max_evaluations": 200})
    found = compare(config, tmp_path / "run")
    assert {row["arm"] for row in found["summary"]} == {"greedy", "windows"}
    assert all(row["heldout_kl_mean"] > 0 for row in found["summary"])
    assert "16 tokens read and 16 written" in found["signature"]["heldout_protocol"]


def test_an_arm_that_needs_gradients_is_refused_before_any_runs(
    folder: Path, tmp_path: Path
) -> None:
    arms = {"windows": {"method": "windows"}, "gates": {"method": "sensitivity"}}
    config = config_of(folder, compare={"seeds": [0], "arms": arms})
    with pytest.raises(ConfigError, match=r"the arm 'gates': search.method sensitivity is there"):
        compare(config, tmp_path / "run")
    assert not list(tmp_path.glob("run/arms/*"))


def test_a_model_is_described(folder: Path) -> None:
    found = inspect_model(str(folder / "model"))
    assert found["model_class"] == "T5ForConditionalGeneration"
    assert found["blocks"] == 7
    assert found["stacks"] == {"encoder": 4, "decoder": 3}
    assert not found["packable"]
    assert len(found["sites"]) == 17
    assert found["self_check"]["replay_difference"] == 0.0


def test_sites_of_both_stacks_are_protected(folder: Path) -> None:
    sites = Session.open(load_config(folder / "run.yaml")).anatomy.sites
    names = [sites[i].name for i in sorted(protected_sites(["last"], sites))]
    assert names[:2] == ["encoder.3.attention", "encoder.3.ffn"]
    assert names[2:] == ["decoder.2.attention", "decoder.2.cross_attention", "decoder.2.ffn"]
    assert {sites[i].name for i in protected_sites(["first", 3], sites)} == {
        "encoder.0.attention", "encoder.0.ffn", "decoder.0.attention", "decoder.0.cross_attention",
        "decoder.0.ffn", "encoder.3.attention", "encoder.3.ffn",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": {"target_column": None}}, "calibration.column and calibration.target_col"),
        ({"calibration": {"chat": True}}, "no chat template|calibration.chat is there for decoder"),
        ({"search": {"method": "sensitivity"}}, "search.method sensitivity is there for decoder"),
        ({"calibration": {"fit_text": "pairs.jsonl", "fit_column": "source"}}, "fit_text is there"),
        ({"calibration": {"source_language": "en"}}, "knows no languages"),
        ({"model": {"streamed": True}}, "can't be streamed"),
    ],
)
def test_what_there_is_not_is_refused_first(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        search(config_of(folder, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_workers_are_counted_for_the_batches_that_there_are(folder: Path, tmp_path: Path) -> None:
    search(config_of(folder, search={"max_evaluations": 12}), tmp_path / "run")
    session = Session.open(config_of(folder))
    batches = session.backend(session.splits(0).select, 0).sequences
    assert read_asked(tmp_path / "run").batches == len(batches) == 4


def test_a_decoder_only_model_has_no_languages(workplace: Path, folder: Path) -> None:
    changed = {"model": {"path": str(workplace / "model")}}
    with pytest.raises(ConfigError, match="for the tokenizers of encoder-decoders"):
        Session.open(config_of(folder, calibration={"target_language": "de"}, **changed))


def test_commands_for_decoder_only_models_say_so(
    folder: Path, finished: Path, tmp_path: Path
) -> None:
    model = str(folder / "model")
    asked = {
        "overfit": lambda: overfit(finished, (128,)),
        "calibrate-check": lambda: check_calibration(config_of(folder), tmp_path / "check"),
        "latency": lambda: write_latency(model, tmp_path / "latency.json"),
        "generate": lambda: generate(model, tmp_path / "own.jsonl", GenerateOptions(tokens=64)),
    }
    for name, ask in asked.items():
        with pytest.raises(UnsupportedModelError, match=f"encoder-decoder, and depthsearch {name}"):
            ask()
    assert list(tmp_path.iterdir()) == []
    assert load_model(model).model.config.is_encoder_decoder


def test_checkpoints_are_evaluated_on_targets(folder: Path, finished: Path, tmp_path: Path) -> None:
    export_run(finished, tmp_path / "small", measure=False)
    targets = Targets("target", written=6, new_tokens=5)
    found = evaluate_checkpoint(
        str(tmp_path / "small"), str(folder / "pairs.jsonl"), column="source", targets=targets,
        beside=str(folder / "model"), window_tokens=16, tokens=320, repeats=1,
    )  # fmt: skip
    dense, small = found["rows"]
    assert (dense["name"], small["name"]) == ("dense", "model")
    assert "n=20 windows" in small["perplexity_protocol"]
    assert small["chrf_protocol"].startswith("6 texts of at most 5 tokens, greedy, against their")
    assert small["parameters"] < dense["parameters"]
    assert small["cross_entropy_nats"] != dense["cross_entropy_nats"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, r"name the columns of both, --column and --target-column"),
        (Targets("target", languages=("de", None)), r"leave --source-language and --target-lang"),
        (Targets("target", chat=True), "--chat is there for decoder-only models alone"),
        (Targets("none"), "no column 'none'"),
    ],
)
def test_targets_that_can_not_be_had_are_refused(
    folder: Path, targets: Targets | None, message: str
) -> None:
    pairs = str(folder / "pairs.jsonl")
    with pytest.raises(InputError, match=message):
        evaluate_checkpoint(str(folder / "model"), pairs, column="source", targets=targets)


def test_models_of_both_kinds_are_not_compared(folder: Path, workplace: Path) -> None:
    pairs, other = str(folder / "pairs.jsonl"), str(workplace / "model")
    with pytest.raises(InputError, match="one is an encoder-decoder and the other is not"):
        evaluate_checkpoint(
            other, pairs, column="source", targets=Targets("target"), beside=str(folder / "model")
        )
