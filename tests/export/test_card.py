from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.tiny_models import keeping, save_tiny, tiny_loaded

from depthsearch.export import CardData, Figure, export
from depthsearch.export.card import base_name, dropped_text
from depthsearch.space import Budget


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    data = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(data, dict)
    return data


def card_text(tmp_path: Path, card: CardData | None = None, source: str = "owner/base") -> str:
    loaded, anatomy = tiny_loaded("llama")
    out = tmp_path / "small"
    export(replace(loaded, source=source), anatomy, keeping("11 10 01 11"), out, card, check=False)
    return (out / "README.md").read_text(encoding="utf-8")


def test_a_full_card_holds_what_a_reader_needs(tmp_path: Path) -> None:
    card = CardData(
        origin="evolution shift",
        budget=Budget("params", ratio=0.75, of="blocks"),
        signature={"version": "0.1.0", "seed": 7},
        figures=(Figure("perplexity", 15.28, 21.0), Figure("parameters", 134515008, None)),
        calibration="encyclopaedia introductions, 16,384 tokens",
        command="depthsearch search run.yaml --out run",
        config="model: owner/base\n",
    )

    text = card_text(tmp_path, card)

    assert front_matter(text) == {
        "base_model": "owner/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["depthsearch", "depth-pruning", "pruned"],
    }
    for piece in (
        "[owner/base](https://huggingface.co/owner/base) without 2 of its 8",
        "3 blocks instead of 4",
        "- `decoder.1.ffn` to `decoder.2.attention` (2 sublayers)",
        "- block 1: attention of block 1, FFN of block 2",
        "| perplexity | 15.28 | 21 |",
        "| parameters | 134,515,008 | not measured |",
        "Budget: params at most 75 % of the dense model's blocks",
        "Found by: evolution shift",
        '"seed": 7',
        "depthsearch search run.yaml --out run",
        "model: owner/base",
        "`11100111`",
        "chosen on encyclopaedia introductions",
        "not trained after pruning",
    ):
        assert piece in text, piece


def test_a_card_without_a_run_leaves_the_unknown_out(tmp_path: Path) -> None:
    text = card_text(tmp_path)

    assert "## Figures" not in text
    assert "Budget" not in text
    assert "Signature" not in text
    assert "None" not in text


def test_licence_and_language_come_from_the_base_model(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "the-base", "llama")
    (base / "README.md").write_text(
        "---\nlicense: gemma\nlicense_link: x.org/l\nlanguage: [en]\nwidget: 1\n---\n# Base\n",
        encoding="utf-8",
    )
    (base / "LICENSE").write_text("the terms", encoding="utf-8")

    data = front_matter(card_text(tmp_path, source=str(base)))

    assert data["license"] == "gemma"
    assert data["license_link"] == "x.org/l"
    assert data["language"] == ["en"]
    assert data["base_model"] == "the-base"
    assert "widget" not in data
    assert (tmp_path / "small" / "LICENSE").read_text(encoding="utf-8") == "the terms"


@pytest.mark.parametrize("readme", ["# no metadata\n", "---\n: [\n---\n", "---\n- a list\n---\n"])
def test_a_base_card_without_metadata_is_no_error(readme: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    (base / "README.md").write_text(readme, encoding="utf-8")

    assert "license" not in front_matter(card_text(tmp_path, source=str(base)))


def test_no_path_of_this_machine_is_written_into_an_export(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    card_text(tmp_path, source=str(base))

    for file in (tmp_path / "small").iterdir():
        if file.suffix in (".json", ".md", ".jinja"):
            assert str(tmp_path) not in file.read_text(encoding="utf-8"), file.name


def test_the_code_of_the_card_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.findall(r"```python\n(.*?)```", card_text(tmp_path), re.DOTALL)
    monkeypatch.chdir(tmp_path)

    exec(code[0], {})

    assert len(code) == 1
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_runs_are_named_as_people_would() -> None:
    sites = tiny_loaded("llama", 6)[1].sites

    def text(pattern: str) -> tuple[str, ...]:
        return dropped_text(sites, keeping(pattern))

    assert text("11 00 00 11 11 11") == ("decoder blocks 1 to 2 (2 blocks)",)
    assert text("11 00 11 11 10 01") == (
        "decoder block 1",
        "`decoder.4.ffn` to `decoder.5.attention` (2 sublayers)",
    )
    assert text("11 10 11 11 11 11") == ("`decoder.1.ffn`",)
    assert text("11 11 11 11 11 11") == ()


def test_runs_end_with_their_stack() -> None:
    sites = tiny_loaded("t5")[1].sites

    def text(pattern: str) -> tuple[str, ...]:
        return dropped_text(sites, keeping(pattern))

    assert text("11 11 11 00 000 111 111") == ("encoder block 3", "decoder block 0")
    assert text("11 11 00 00 000 000 111") == (
        "encoder blocks 2 to 3 (2 blocks)",
        "decoder blocks 0 to 1 (2 blocks)",
    )
    assert text("11 11 11 11 101 110 011") == (
        "`decoder.0.cross_attention`",
        "`decoder.1.ffn` to `decoder.2.attention` (2 sublayers)",
    )


def test_the_limits_name_the_text_that_was_fitted_on(tmp_path: Path) -> None:
    sites = {"decoder.1.attention": {"left": 0.5, "ridge": 1e-3}}
    repair = {"sites": sites, "fit_tokens": 1000}
    card = CardData(calibration="text.txt", fitted_on="own.jsonl", repair=repair)
    text = card_text(tmp_path, card)
    assert "The output projection of 1 sublayer (number of the base model) was refitted" in text
    assert "refitted, in closed form, on tokens of own.jsonl; the model was not" in text


def test_a_card_does_not_claim_refits_that_there_were_none_of(tmp_path: Path) -> None:
    repair: dict[str, Any] = {"sites": {}, "fit_tokens": 1000}
    text = card_text(tmp_path, CardData(calibration="text.txt", repair=repair))
    assert "## What was refitted\n\nNothing: " in text
    assert "0 sublayers" not in text
    assert "are the base model's own; the model was not" in text


def two_stacks_text(tmp_path: Path, about: dict[str, Any] | None = None, **settings: Any) -> str:
    loaded, anatomy = tiny_loaded("t5")
    repair = {"sites": {"decoder.0.ffn": {"left": 0.5, "ridge": 1e-3}}, "fit_tokens": 1000}
    loaded, mask = replace(loaded, **settings), keeping("11 10 01 11 110 001 111")
    card = CardData(repair=repair, **(about or {}))
    export(loaded, anatomy, mask, tmp_path / "small", card, check=False)
    return (tmp_path / "small" / "README.md").read_text(encoding="utf-8")


def test_the_card_of_an_encoder_decoder_tells_its_stacks_apart(tmp_path: Path) -> None:
    text = two_stacks_text(tmp_path)

    for piece in (
        "without 5 of its 17 attention, cross-attention and FFN sublayers: 3 encoder blocks "
        "instead of 4 and 2 decoder blocks instead of 3, ",
        "- `encoder.1.ffn` to `encoder.2.attention` (2 sublayers)",
        "- `decoder.0.ffn` to `decoder.1.cross_attention` (3 sublayers)",
        "- encoder block 1: attention of block 1, FFN of block 2",
        "- decoder block 0: attention of block 0, cross-attention of block 0, FFN of block 1",
        "The output projection of 1 sublayer",
    ):
        assert piece in text, piece
    assert "pipeline_tag" not in front_matter(text)


def test_what_an_encoder_decoder_is_for_comes_from_the_base_model(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "t5")
    (base / "README.md").write_text("---\npipeline_tag: translation\n---\n", encoding="utf-8")

    assert (
        front_matter(two_stacks_text(tmp_path, source=str(base)))["pipeline_tag"] == "translation"
    )


@pytest.mark.parametrize("languages", [None, ("eng_Latn", "deu_Latn")])
def test_the_code_of_the_card_of_an_encoder_decoder_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    languages: tuple[str, str] | None,
) -> None:
    text = two_stacks_text(tmp_path, {"languages": languages, "starts": (0, 7)})
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)

    names: dict[str, Any] = {}
    exec(code[0], names)

    assert len(code) == 1
    assert "AutoModelForSeq2SeqLM" in code[0]
    assert capsys.readouterr().out
    if languages is not None:
        assert names["tokenizer"].src_lang == "eng_Latn"
        assert names["written"].tolist()[:2] == [0, 7]


def test_a_local_base_is_named_without_its_path() -> None:
    loaded = tiny_loaded("llama", 2)[0]

    assert base_name(loaded) == "owner/tiny-llama"
    assert base_name(replace(loaded, source="/data/models/my-model")) == "my-model"
    assert base_name(replace(loaded, source="my-model.Q4_1.gguf")) == "my-model.Q4_1.gguf"
