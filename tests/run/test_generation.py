"""Text that a model writes, and repairs that are fitted on it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import Cli
from tests.tiny_runs import workplace_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from depthsearch.errors import DataError, InputError
from depthsearch.journal import read_journal, without_times
from depthsearch.model.load import LoadedModel, load_model
from depthsearch.run import generation
from depthsearch.run.directory import BEST, JOURNAL, REPAIR
from depthsearch.run.figures import export_run
from depthsearch.run.generation import GenerateOptions, generate
from depthsearch.run.search import resume, search

OPTIONS = GenerateOptions(tokens=600, window_tokens=24, batch=8)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def written(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "own.jsonl"
    generate(str(workplace / "model"), out, OPTIONS)
    return out


def test_texts_longer_than_the_context_are_refused(workplace: Path, tmp_path: Path) -> None:
    options = GenerateOptions(tokens=10, window_tokens=1000)
    with pytest.raises(InputError, match="exceed the model's context of 128: lower --window"):
        generate(str(workplace / "model"), tmp_path / "own.jsonl", options)
    assert not list(tmp_path.iterdir())


def test_texts_are_samples_of_the_models_own_distribution(workplace: Path, tmp_path: Path) -> None:
    """First tokens of many texts, against the probabilities that plain transformers gives them."""
    folder = workplace / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        wanted = model(torch.tensor([[start]])).logits[0, -1].softmax(-1)
    out = tmp_path / "own.jsonl"
    options = GenerateOptions(tokens=4000, window_tokens=1, batch=500)
    generate(str(folder), out, options)
    counts = torch.zeros(len(wanted))
    for text in texts(out):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            counts[ids[0]] += 1
    shown = wanted.clone()
    shown[counts == 0] = 0  # specials, and what doesn't survive decoding
    shown /= shown.sum()
    total = float(counts.sum())
    assert total > 2000
    # Twice the total variation that so many draws of this distribution have on average.
    usual = float((shown * (1 - shown) / total).sqrt().sum()) * 0.4
    assert 0.5 * float((counts / total - shown).abs().sum()) < 2 * usual
    uniform = torch.full_like(shown, 1 / len(shown))
    assert 0.5 * float((uniform - shown).abs().sum()) > 2 * usual


def test_the_same_seed_gives_the_same_text_and_more_begins_with_less(
    workplace: Path, written: Path, tmp_path: Path
) -> None:
    model = str(workplace / "model")
    more, other = tmp_path / "more.jsonl", tmp_path / "other.jsonl"
    found = generate(model, more, GenerateOptions(tokens=1500, window_tokens=24, batch=8))
    generate(model, other, GenerateOptions(tokens=600, window_tokens=24, batch=8, seed=1))
    assert texts(more)[: len(texts(written))] == texts(written)
    assert not set(texts(other)) & set(texts(written))
    assert 1500 <= found["tokens"] < 1500 + 24
    assert found["texts"] == len(texts(more))


def test_a_repair_is_fitted_on_it_and_says_so(
    workplace: Path, written: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "calibration": {"finals_fit_tokens": 512, "fit_text": str(written), "fit_share": 0.5},
        "space": {"granularity": "block", "budget": {"drop_blocks": 1}},
        "search": {"max_evaluations": 6, "finalists": 1, "finish": "gap"},
    }
    config = workplace_config(workplace, **changes)
    search(config, tmp_path / "mixed")
    del changes["calibration"]["fit_text"]
    search(workplace_config(workplace, **changes), tmp_path / "plain")
    best = json.loads((tmp_path / "mixed" / BEST).read_text())
    said = best["signature"]["data"]["fit"]
    assert said["source"] == "own.jsonl"
    assert said["share"] == 0.5
    plain = json.loads((tmp_path / "plain" / BEST).read_text())
    assert "fit" not in plain["signature"]["data"]
    # Other text, other weights; what masks are judged on stays.
    assert best["repair"]["sha256"] != plain["repair"]["sha256"]
    tells = [
        [e["losses"] for r in read_journal(tmp_path / run / JOURNAL) if r["op"] == "tell"
         for e in r["evaluations"]]
        for run in ("mixed", "plain")
    ]  # fmt: skip
    assert tells[0] == tells[1]
    # The folder that the text lies in is nobody's business.
    assert str(written.parent) not in (tmp_path / "mixed" / JOURNAL).read_text()
    journal = without_times(read_journal(tmp_path / "mixed" / JOURNAL))
    lines = (tmp_path / "mixed" / JOURNAL).read_text().splitlines(keepends=True)
    (tmp_path / "mixed" / JOURNAL).write_text("".join(lines[:4]))
    (tmp_path / "mixed" / BEST).unlink()
    (tmp_path / "mixed" / REPAIR).unlink()
    resume(tmp_path / "mixed")
    assert without_times(read_journal(tmp_path / "mixed" / JOURNAL)) == journal
    # What was fitted is in the run, so an export does without the text.
    written.rename(tmp_path / "moved.jsonl")
    export_run(tmp_path / "mixed", tmp_path / "model", measure=False)
    (tmp_path / "moved.jsonl").rename(written)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "fit_text: own.jsonl" in card
    assert "tokens of text.txt, 50 % of them of own.jsonl were used" in card


@pytest.mark.parametrize("options", [{"seed": 20261231235959}, {"window_tokens": 6, "batch": 1}])
def test_any_seed_and_small_batches_do(
    workplace: Path, tmp_path: Path, options: dict[str, int]
) -> None:
    out = tmp_path / "own.jsonl"
    chosen = GenerateOptions(**{"tokens": 60, "window_tokens": 24, "batch": 8, **options})
    assert generate(str(workplace / "model"), out, chosen)["tokens"] >= 60
    assert texts(out)


def scripted(monkeypatch: pytest.MonkeyPatch, lengths: Iterator[int]) -> None:
    """Have the model end its texts after so many tokens."""

    def load(*args: Any) -> LoadedModel:
        loaded = load_model(*args)
        end = loaded.tokenizer.eos_token_id

        def write(start: torch.Tensor, **_: Any) -> torch.Tensor:
            wanted = [next(lengths) for _ in start]
            rows = [[40] * length + [end] * (24 - length) for length in wanted]
            return torch.cat([start, torch.tensor(rows)], dim=1)

        monkeypatch.setattr(loaded.model, "generate", write)
        return loaded

    monkeypatch.setattr(generation, "load_model", load)


def test_a_few_short_texts_are_no_silence(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, itertools.cycle([3, 0, 0, 0, 5, 0, 9]))
    options = GenerateOptions(tokens=50, window_tokens=24, batch=1)
    found = generate(str(workplace / "model"), tmp_path / "own.jsonl", options)
    assert (found["tokens"], found["texts"]) == (51, 9)


def test_a_silent_model_is_an_error(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, itertools.chain([9] * 20, itertools.repeat(0)))
    options = GenerateOptions(tokens=500, window_tokens=24, batch=2)
    with pytest.raises(DataError, match=r"ends 32 texts in a row .*\(--start\)"):
        generate(str(workplace / "model"), tmp_path / "own.jsonl", options)


def test_nothing_to_begin_with_is_an_error(workplace: Path, tmp_path: Path) -> None:
    options = GenerateOptions(tokens=10, start="")
    with pytest.raises(InputError, match="--start is empty"):
        generate(str(workplace / "model"), tmp_path / "own.jsonl", options)
    assert not list(tmp_path.iterdir())


def test_the_command(workplace: Path, cli: Cli, tmp_path: Path, written: Path) -> None:
    out = tmp_path / "own.jsonl"
    model = workplace / "model"
    asked = ("--tokens", 600, "--window-tokens", 24, "--batch", 8)
    shown = cli("generate", model, out, *asked, "--json")
    assert shown.code == 0, shown.err
    found = json.loads(shown.out)
    assert found["seed"] == 0
    assert found["tokens"] >= 600
    assert texts(out) == texts(written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--tokens", 0), "--tokens is 0; allowed: 1 or more"),
        (("--temperature", 0), "--temperature is 0; allowed: above 0"),
        (
            ("--temperature", 1e-40, "--tokens", 8, "--window-tokens", 8),
            "--temperature is 1e-40: the model's logits overflow",
        ),
        (("--seed", -1), "--seed is -1"),
    ],
)
def test_mistakes_end_with_one_line_and_two(
    workplace: Path, cli: Cli, tmp_path: Path, changes: tuple[Any, ...], message: str
) -> None:
    shown = cli("generate", workplace / "model", tmp_path / "own.jsonl", *changes)
    assert shown.code == 2
    assert message in " ".join(shown.err.split())
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_the_name_says_what_it_is(
    workplace: Path, cli: Cli, tmp_path: Path
) -> None:
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    for out, message in ((there, "never overwritten"), (tmp_path / "x.txt", "must end in .jsonl")):
        shown = cli("generate", workplace / "model", out)
        assert shown.code == 2
        assert message in " ".join(shown.err.split())
    assert there.read_text() == "mine"
