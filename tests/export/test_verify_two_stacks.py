"""The check of exports of encoder-decoders, and that what it checks is exact in every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import (
    ENCODER_DECODER_TYPES,
    VOCAB,
    keeping,
    paired_ids,
    tiny_loaded,
    tiny_model,
)
from transformers import AutoModelForSeq2SeqLM

from depthsearch.errors import ExportError
from depthsearch.export import (
    Case,
    Verification,
    export,
    plan_native,
    probe,
    verify_export,
    verify_exports,
)
from depthsearch.export.verify import random_ids
from depthsearch.model.anatomy import describe
from depthsearch.model.switches import masked

DENSE = "11 11 11 11 111 111 111"
BLOCKS = "11 00 11 00 111 000 111"
REPAIRED = "10 01 10 01 110 001 111"
NO_FIRST = "00 10 01 11 000 110 001"
THREE = "11 11 10 01 100 010 001"
PATTERNS = (DENSE, BLOCKS, REPAIRED, NO_FIRST, THREE)
SEVERAL = 4


def case(model_type: str, pattern: str, folder: Path, dtype: torch.dtype = torch.float32) -> Case:
    loaded, parts = tiny_loaded(model_type, dtype=dtype)
    name = f"{model_type}-{pattern.replace(' ', '')}-{dtype}"
    result = export(loaded, parts, keeping(pattern), folder / name, check=False)
    return Case(loaded, parts, keeping(pattern), result.path)


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verification]:
    """Exports of every family, all checked in one clean interpreter, by directory name."""
    folder = tmp_path_factory.mktemp("exports")
    cases = [case(kind, pattern, folder) for kind in ENCODER_DECODER_TYPES for pattern in PATTERNS]
    cases += [case(kind, REPAIRED, folder, torch.bfloat16) for kind in ("mbart", "t5")]
    found = verify_exports(cases, paired_ids(), SEVERAL)
    return {c.path.name: v for c, v in zip(cases, found, strict=True)}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_masks_export_exactly_in_every_family(
    model_type: str, pattern: str, verified: dict[str, Verification]
) -> None:
    found = verified[f"{model_type}-{pattern.replace(' ', '')}-torch.float32"]

    assert found.passed
    assert max(found.max_difference, found.cached_max_difference) < 1e-5
    assert found.argmax_agreement == 1.0
    assert found.generation_equal
    # Three passes over three rows of what is written, the padding of what is read aside.
    assert found.positions == 3 * 3 * 16


@pytest.mark.parametrize("model_type", ["mbart", "t5"])
def test_bfloat16_agrees_on_every_position(
    model_type: str, verified: dict[str, Verification]
) -> None:
    found = verified[f"{model_type}-{REPAIRED.replace(' ', '')}-torch.bfloat16"]

    assert found.dtype == "bfloat16"
    assert found.passed
    assert found.argmax_agreement == 1.0


@pytest.mark.parametrize("pattern", [REPAIRED, NO_FIRST])
@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_plain_transformers_loads_and_runs_an_export(
    model_type: str, pattern: str, tmp_path: Path
) -> None:
    made = case(model_type, pattern, tmp_path)
    dense, ids = made.loaded.model, paired_ids()
    read, written = ids[:, :16], ids[:, 16:]
    given = {"input_ids": read, "attention_mask": (read != 0).long()}

    small: Any = AutoModelForSeq2SeqLM.from_pretrained(made.path)

    assert type(small) is type(dense)
    plan = plan_native(made.anatomy, made.mask)
    counts = [stack.blocks for stack in describe(small).stacks]
    assert counts == [len(stack.pairs) for stack in plan.stacks]
    further = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with torch.no_grad(), masked(dense, made.anatomy, made.mask):
        expected = dense(**given, decoder_input_ids=written).logits
        generated = dense.generate(**given, **further)
    with torch.no_grad():
        assert torch.equal(small(**given, decoder_input_ids=written).logits, expected)
        assert torch.equal(small.generate(**given, **further), generated)
    assert generated.shape == (3, 13)


def edit_weight(path: Path, name: str, value: float | None) -> None:
    """Add to one number of a weight of the export, or leave the weight out."""
    state = load_file(path / "model.safetensors")
    if value is None:
        del state[name]
    else:
        state[name].flatten()[0] += value
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def test_the_check_sees_what_is_wrong_with_an_export(tmp_path: Path) -> None:
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    edits = {
        "encoder": ("encoder.block.1.layer.1.DenseReluDense.wo.weight", 2.0),
        "encoder bias": (f"encoder.{bias}", 5.0),
        "decoder bias": (f"decoder.{bias}", 5.0),
        "cross": ("decoder.block.0.layer.1.EncDecAttention.v.weight", None),
    }
    cases = {name: case("t5", REPAIRED, tmp_path / name) for name in ("sound", *edits)}
    for name, (weight, value) in edits.items():
        edit_weight(cases[name].path, weight, value)
    cases["mask"] = replace(cases["sound"], mask=keeping("10 01 10 01 100 011 111"))

    found = dict(
        zip(cases, verify_exports(list(cases.values()), paired_ids(), SEVERAL), strict=True)
    )

    assert found["sound"].passed
    assert not any(v.passed for name, v in found.items() if name != "sound")
    for name in ("encoder", "encoder bias", "decoder bias", "mask"):
        assert found[name].max_difference > 1e-3, name
        assert found[name].cached_max_difference > 1e-3, name
    assert edits["cross"][0] in found["cross"].loading_problems


@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_the_passes_say_the_same_in_three_ways(model_type: str) -> None:
    model, ids = tiny_model(model_type, dtype=torch.float64), paired_ids(rows=3)
    passes = {name: probe.run_pass(model, name, ids, SEVERAL) for name in probe.PASSES}
    # Row 0 came with 4 tokens of padding to read, row 2 of the padded pass is given as many.
    with torch.no_grad():
        cut = model(input_ids=ids[:, :12], decoder_input_ids=ids[:, 16:]).logits

    def close(one: torch.Tensor, other: torch.Tensor) -> bool:
        return torch.allclose(one, other, atol=1e-3, rtol=1e-3)

    assert all(logits.shape == (3, 16, VOCAB) for logits in passes.values())
    assert close(passes["cached"], passes["prefill"])
    assert close(passes["prefill"][0], cut[0])
    assert close(passes["padded"][0], cut[0])
    assert close(passes["padded"][2], cut[2])
    assert not close(passes["prefill"][2], cut[2])


@pytest.mark.parametrize("pad", [0, 5])
def test_random_ids_fit_both_stacks_and_hold_no_padding(pad: int) -> None:
    apart: dict[str, Any] = {
        "share_encoder_decoder_embeddings": False,
        "decoder_vocab_size": VOCAB - 20,
    }
    model = tiny_model("marian", pad_token_id=pad, max_position_embeddings=40, **apart)

    ids = random_ids(model, SEVERAL)

    assert ids.shape == (2, 2 * 40)
    assert not (ids == pad).any()
    assert int(ids.max()) < VOCAB - 20


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(10, r"more than 11 tokens a row: got \(2, 10\)"), (13, r"got \(2, 13\), an odd number")],
)
def test_rows_that_are_no_two_halves_are_refused(tokens: int, message: str, tmp_path: Path) -> None:
    loaded, parts = tiny_loaded("t5", 2)

    with pytest.raises(ExportError, match=message):
        verify_export(
            loaded, parts, keeping("11 11 111"), tmp_path, torch.ones(2, tokens).long(), SEVERAL
        )
