from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.tiny_runs import WORDS, workplace_config, write_text
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from depthsearch.errors import DataError, ExportError, ModelError, RunDirectoryError
from depthsearch.model.load import load_model
from depthsearch.model.switches import masked
from depthsearch.run.directory import BEST, CONFIG, JOURNAL
from depthsearch.run.evaluating import Targets, evaluate_checkpoint
from depthsearch.run.figures import card_figures, export_run, measures
from depthsearch.run.search import search
from depthsearch.run.session import Session
from depthsearch.space import Mask


@pytest.fixture(scope="module")
def packable(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose mask can be exported."""
    config = workplace_config(
        workplace, space={"packable": True}, search={"method": "windows", "racing": False}
    )
    out = tmp_path_factory.mktemp("packable") / "run"
    search(config, out)
    return out


@pytest.fixture(scope="module")
def exported(packable: Path) -> tuple[Path, Any, dict[str, Any], list[tuple[str, int, int]]]:
    """That run, exported and measured beside the dense model."""
    stages: list[tuple[str, int, int]] = []
    out = packable.parent / "small"
    result, summary = export_run(
        packable, out, repeats=1, on_stage=lambda *call: stages.append(call)
    )
    return out, result, summary, stages


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class TestExport:
    def test_the_checkpoint_is_the_masked_model(
        self, exported: Any, packable: Path, session: Session
    ) -> None:
        out, result, _, _ = exported
        best = json.loads((packable / BEST).read_text())
        small = load_model(str(out), "float32", "cpu").model
        ids = session.splits(0).heldout[:2]
        with torch.no_grad():
            logits = small(input_ids=ids).logits
            with masked(session.loaded.model, session.anatomy, Mask.from_key(best["mask"])):
                expected = session.loaded.model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert sum(p.numel() for p in small.parameters()) == result.parameters == best["cost"]

    def test_the_summary_is_kept_with_the_run(self, exported: Any, packable: Path) -> None:
        out, result, summary, _ = exported
        assert json.loads((packable / "export.json").read_text()) == summary
        assert summary["path"] == str(out)
        assert summary["mask"] == json.loads((packable / BEST).read_text())["mask"]
        assert summary["parameters"] == result.parameters
        assert summary["verification"] is not None
        dense, pruned = summary["rows"]
        assert (dense["name"], pruned["name"]) == ("dense", "pruned")
        assert pruned["parameters"] == result.parameters < dense["parameters"]
        assert 0 < pruned["disk_bytes"] < dense["disk_bytes"]
        assert pruned["kv_bytes_per_token"] < dense["kv_bytes_per_token"]
        for row in (dense, pruned):
            for _, key in measures(summary["rows"]):
                assert row[key] > 0, key
        assert dense["perplexity_protocol"] == pruned["perplexity_protocol"]

    def test_the_card_has_the_same_figures(self, exported: Any) -> None:
        out, _, summary, _ = exported
        card = (out / "README.md").read_text()
        *figures, protocol = card_figures(summary["rows"])
        assert [figure.name for figure in figures] == [
            phrase for phrase, _ in measures(summary["rows"])
        ]
        for figure in (*figures, protocol):
            assert figure.name in card

    def test_every_stage_is_reported_to_its_end(self, exported: Any) -> None:
        stages = exported[3]
        last = {stage: (done, total) for stage, done, total in stages}
        assert list(last) == ["perplexity, dense", "perplexity, pruned", "speed", "memory"]
        assert all(done == total for done, total in last.values())

    def test_figures_say_what_they_were_measured_with(self, exported: Any, packable: Path) -> None:
        signature = exported[2]["signature"]
        searched = json.loads((packable / BEST).read_text())["signature"]
        now = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": "cpu"}
        assert now.items() <= signature["measured_with"].items()
        assert {key: signature[key] for key in searched} == searched

    def test_text_that_has_changed_leaves_no_figures(self, packable: Path, tmp_path: Path) -> None:
        """What is held out of it now may be what the search selected on."""
        run, text = tmp_path / "run", tmp_path / "text.txt"
        shutil.copytree(packable, run)
        config = yaml.safe_load((run / CONFIG).read_text())
        source = Path(config["calibration"]["text"])
        text.write_text(source.read_text() + "\n\nOne more document that was not there before.\n")
        config["calibration"]["text"] = str(text)
        (run / CONFIG).write_text(yaml.safe_dump(config))
        result, summary = export_run(run, tmp_path / "small")
        assert "text.txt has changed since the search" in str(result.unmeasured)
        assert summary["rows"] == []
        assert (tmp_path / "small" / "config.json").is_file()

    def test_a_run_of_a_cluster_is_exported_without_ray(
        self, packable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = tmp_path / "run"
        shutil.copytree(packable, run)
        config = yaml.safe_load((run / CONFIG).read_text())
        config["cluster"] |= {"backend": "ray", "threads": None, "num_cpus": 1}
        (run / CONFIG).write_text(yaml.safe_dump(config))
        monkeypatch.setattr("depthsearch.run.workers.find_spec", lambda name: None)
        result, _ = export_run(run, tmp_path / "small", measure=False)
        assert result.verification is not None

    def test_an_unfinished_run_is_refused(self, packable: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.mkdir()
        for name in (CONFIG, JOURNAL):
            (run / name).write_bytes((packable / name).read_bytes())
        with pytest.raises(RunDirectoryError, match=r"has no best\.json.*depthsearch resume"):
            export_run(run, tmp_path / "small")
        with pytest.raises(RunDirectoryError, match="not a run directory"):
            export_run(tmp_path / "nowhere", tmp_path / "small")
        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    @pytest.mark.parametrize(
        "damage",
        [
            {"signature": 5},
            {"signature": {"data": {}, "model": {}}},
            {"mask": None},
            {"repair": {"kind": "gap"}},
        ],
    )
    def test_a_result_that_is_something_else_is_refused(
        self, packable: Path, tmp_path: Path, damage: dict[str, Any]
    ) -> None:
        run = tmp_path / "run"
        shutil.copytree(packable, run)
        best = json.loads((run / BEST).read_text()) | damage
        (run / BEST).write_text(json.dumps(best))
        with pytest.raises(RunDirectoryError, match=r"best\.json is damaged"):
            export_run(run, tmp_path / "small")
        assert not (tmp_path / "small").exists()

    def test_it_is_kept_where_memory_or_the_run_refuses_figures(
        self, packable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = tmp_path / "run"
        shutil.copytree(packable, run)
        (run / "export.json").unlink(missing_ok=True)
        (run / "export.json").mkdir()

        def full(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr("depthsearch.run.figures.measure_speed", full)
        result, summary = export_run(run, tmp_path / "small")
        assert "memory does not suffice" in str(summary["unmeasured"])
        assert "cannot write" in str(summary["unrecorded"])
        assert (tmp_path / "small/depthsearch.json").is_file()
        assert result.verification is not None

    def test_an_existing_directory_is_refused(self, packable: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        run = contents(packable)
        with pytest.raises(ExportError, match="exists"):
            export_run(packable, tmp_path)
        assert contents(tmp_path) == {"mine.txt": b"mine"}
        assert contents(packable) == run

    def test_a_mask_that_can_not_be_packed_is_refused(
        self, session: Session, workplace: Path, tmp_path: Path
    ) -> None:
        budget = {"keep_params": 0.9, "of": "blocks"}
        config = workplace_config(
            workplace,
            space={"granularity": "ffn", "budget": budget},
            search={"method": "block_influence"},
        )
        search(config, tmp_path / "run")
        with pytest.raises(ExportError):
            export_run(tmp_path / "run", tmp_path / "small", measure=False)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert not (tmp_path / "run" / "export.json").exists()

    def test_another_model_in_the_old_place_is_refused(
        self, packable: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        run.mkdir()
        for name in (CONFIG, JOURNAL, BEST):
            (run / name).write_bytes((packable / name).read_bytes())
        best = json.loads((run / BEST).read_text())
        best["model"]["fingerprint"] = "f" * 64
        (run / BEST).write_text(json.dumps(best))
        with pytest.raises(RunDirectoryError, match="fingerprint differs"):
            export_run(run, tmp_path / "small")
        assert not (tmp_path / "small").exists()


class TestEvaluate:
    def test_a_single_short_document_is_enough(
        self, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All of the text counts, and less of it than was asked for."""
        monkeypatch.setattr("depthsearch.run.evaluating.measure_beside", counted_windows)
        text = tmp_path / "one.txt"
        text.write_text("block drops search " * 40)
        settings: dict[str, Any] = {"window_tokens": 16, "dtype": "float32", "device": "cpu"}
        model = str(workplace / "model")
        (whole,) = evaluate_checkpoint(model, str(text), **settings)["rows"]
        (part,) = evaluate_checkpoint(model, str(text), tokens=40, **settings)["rows"]
        assert whole["windows"] > 3
        assert part["windows"] == 2

    @pytest.mark.parametrize("chat", [False, True])
    def test_targets_alone_are_scored(self, workplace: Path, tmp_path: Path, chat: bool) -> None:
        """As plain transformers scores each target behind its prompt, one pair at a time."""
        rng = random.Random(0)
        rows = [
            {"source": " ".join(rng.choices(WORDS, k=k)), "target": " ".join(rng.choices(WORDS))}
            for k in range(2, 12)
        ]
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_text("\n".join(json.dumps(row) for row in rows))
        model, tokenizer = (
            auto.from_pretrained(workplace / "model")
            for auto in (AutoModelForCausalLM, AutoTokenizer)
        )
        losses = []
        for row in rows:
            prompt = f"Say {row['source']}\n"
            if chat:
                prompt = f"<|user|>{prompt}</s>"
            start = len(tokenizer(prompt)["input_ids"])
            ids = tokenizer(f"{prompt}{row['target']}</s>", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(ids).logits[0, start - 1 : -1]
            losses += cross_entropy(logits, ids[0, start:], reduction="none").tolist()
        (found,) = evaluate_checkpoint(
            str(workplace / "model"), str(pairs), column="source", dtype="float32", device="cpu",
            targets=Targets("target", "Say {source}\n", chat, written=3, new_tokens=4), repeats=1,
        )["rows"]  # fmt: skip
        assert found["cross_entropy_nats"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert found["perplexity_protocol"].startswith("targets alone, behind their prompts, ")
        assert found["perplexity_protocol"].endswith("n=10 windows")
        assert found["chrf_protocol"].startswith("3 texts of at most 4 tokens")

    def test_what_is_missing_is_said(self, workplace: Path, tmp_path: Path) -> None:
        text, model = str(workplace / "text.txt"), str(workplace / "model")
        with pytest.raises(DataError, match="no such file"):
            evaluate_checkpoint(model, str(tmp_path / "missing.txt"))
        with pytest.raises(ModelError, match="no such file"):
            evaluate_checkpoint(str(tmp_path / "missing"), text)
        with pytest.raises(ModelError, match="no such file"):
            evaluate_checkpoint(model, text, beside=str(tmp_path / "missing"))
        with pytest.raises(DataError, match="lower window_tokens"):
            evaluate_checkpoint(
                model, str(write_text(tmp_path / "t.txt", 1)), window_tokens=9999, tokens=99999
            )


def counted_windows(models: Any, windows: torch.Tensor, **_: Any) -> list[dict[str, Any]]:
    """In place of the slow measurements: what would be measured."""
    return [{"windows": len(windows)} for _ in models]
