"""Exports of encoder-decoders: plans, settings and weights of both stacks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import (
    ENCODER_DECODER_TYPES,
    VOCAB,
    keeping,
    tiny_config,
    tiny_loaded,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModelForSeq2SeqLM

from depthsearch.errors import ExportError
from depthsearch.export import (
    NativePlan,
    export,
    plan_native,
    probe,
    truncated_config,
    truncated_state,
)
from depthsearch.export.verify import random_ids
from depthsearch.model.anatomy import Anatomy, describe
from depthsearch.model.load import LoadedModel
from depthsearch.model.switches import masked

DENSE = "11 11 11 11 111 111 111"
BLOCKS = "11 00 11 00 111 000 111"
REPAIRED = "10 01 10 01 110 001 111"
NO_FIRST = "00 10 01 11 000 110 001"
SEVERAL = 4
T5 = ("t5", "mt5")


def anatomy(model_type: str = "bart") -> Anatomy:
    return describe(tiny_model(model_type))


def counts(config: Any) -> tuple[int, int]:
    if config.model_type in T5:
        return config.num_layers, config.num_decoder_layers
    return config.encoder_layers, config.decoder_layers


def test_each_stack_has_a_plan() -> None:
    plan = plan_native(anatomy(), keeping("10 01 00 11 110 000 001"))

    assert plan.pairs == ((0, 1), (3, 3), (0, 0, 2))
    assert (plan.encoder_blocks, plan.dense_blocks, plan.dense_encoder_blocks) == (2, 7, 4)
    assert plan.stacks == (NativePlan(((0, 1), (3, 3)), 4), NativePlan(((0, 0, 2),), 3))
    assert not plan.is_dense
    assert plan_native(anatomy(), keeping(DENSE)).is_dense
    assert not plan_native(anatomy(), keeping(BLOCKS)).is_dense


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (
            "11 01 11 11 111 111 111",
            r"encoder to be attention, FFN in turn, but it goes from encoder\.0\.ffn to "
            r"encoder\.1\.ffn",
        ),
        ("01 11 11 11 111 111 111", r"but it begins with encoder\.0\.ffn"),
        (
            "11 11 11 11 111 101 111",
            r"decoder to be attention, cross-attention, FFN in turn, but it goes from "
            r"decoder\.1\.attention to decoder\.1\.ffn",
        ),
        ("11 11 11 11 111 111 110", r"but it ends with decoder\.2\.cross_attention"),
        # An even run, which a stack without cross-attention could lose.
        ("11 11 11 11 100 111 111", r"goes from decoder\.0\.attention to decoder\.1\.attention"),
        # Neighbours, but of two stacks.
        ("11 11 11 10 011 111 111", r"but it ends with encoder\.3\.attention"),
    ],
)
def test_masks_without_ordinary_blocks_are_refused(pattern: str, reason: str) -> None:
    with pytest.raises(ExportError, match=reason) as caught:
        plan_native(anatomy(), keeping(pattern))

    assert "granularity: block" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "stack"),
    [("00 00 00 00 111 111 111", "encoder"), ("11 11 11 11 000 000 000", "decoder")],
)
def test_each_stack_keeps_a_block(pattern: str, stack: str, tmp_path: Path) -> None:
    loaded, parts = tiny_loaded("t5")

    with pytest.raises(ExportError, match=f"drops every block of the {stack}: keep at least one"):
        export(loaded, parts, keeping(pattern), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_the_configuration_counts_both_stacks(model_type: str) -> None:
    config = tiny_config(model_type)
    before = copy.deepcopy(config.to_dict())

    small = truncated_config(config, plan_native(anatomy(model_type), keeping(NO_FIRST)))

    assert counts(small) == (2, 1)
    assert small.num_hidden_layers == 2
    changed = {name for name, value in small.to_dict().items() if before.get(name) != value}
    assert len(changed) == 2
    assert config.to_dict() == before
    again = type(config)(**small.to_dict())
    assert counts(again) == (2, 1)


def test_lists_of_a_named_stack_are_cut_and_others_refused() -> None:
    plan = plan_native(anatomy(), keeping("10 01 00 11 110 000 001"))
    lists: dict[str, Any] = {
        "encoder_windows": [1, 2, 3, 4],
        "encoder_ffn_sizes": (10, 20, 30, 40),
        "decoder_windows": [5, 6, 7],
        "decoder_ffn_sizes": [50, 60, 70],
        "decoder_others": [1, 2, 3, 4],
        "bad_words_ids": [[1], [2], [3]],
        "two": [1, 2],
    }

    small = truncated_config(tiny_config("bart", **lists), plan)

    assert small.encoder_windows == [1, 4]
    assert small.encoder_ffn_sizes == (20, 40)
    assert small.decoder_windows == [5]
    assert small.decoder_ffn_sizes == [70]
    for name in ("decoder_others", "two"):
        assert getattr(small, name) == lists[name]


@pytest.mark.parametrize("length", [3, 4, 7])
def test_a_list_that_could_be_either_stacks_is_refused(length: int) -> None:
    parts, config = anatomy(), tiny_config("bart", windows=[8] * length)

    with pytest.raises(ExportError, match=rf"'windows' has {length} entries and does not say"):
        truncated_config(config, plan_native(parts, keeping(BLOCKS)))
    assert truncated_config(config, plan_native(parts, keeping(DENSE))).windows == [8] * length


@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_each_new_block_takes_three_sublayers_with_their_norms(model_type: str) -> None:
    model = tiny_model(model_type)
    parts, dense = describe(model), model.state_dict()

    state = truncated_state(model, parts, plan_native(parts, keeping("10 01 11 11 100 010 001")))

    wanted = (("encoder", 0, (0, 1)), ("encoder", 1, (2, 2)), ("decoder", 0, (0, 1, 2)))
    for name, new, sources in wanted:
        stack = next(s for s in parts.stacks if s.name == name)
        for kind, source in zip(stack.row.kinds, sources, strict=True):
            for part in stack.row.parts(kind):
                prefix = f"{stack.path}.{source}.{part}."
                inner = [n.removeprefix(prefix) for n in dense if n.startswith(prefix)]
                assert inner
                for weight in inner:
                    there = state[f"{stack.path}.{new}.{part}.{weight}"]
                    assert there.data_ptr() == dense[prefix + weight].data_ptr()
    decoder = parts.stacks[1].path
    assert not any(name.startswith(f"{decoder}.1.") for name in state)


@pytest.mark.parametrize("model_type", T5)
def test_the_first_block_has_the_only_position_bias(model_type: str) -> None:
    model = tiny_model(model_type)
    parts, dense = describe(model), model.state_dict()

    state = truncated_state(model, parts, plan_native(parts, keeping(NO_FIRST)))

    tables = [name for name in state if "relative_attention_bias" in name]
    assert tables == [
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        for stack in ("encoder", "decoder")
    ]
    for name in tables:
        assert state[name].data_ptr() == dense[name].data_ptr()
        query = name.replace("relative_attention_bias", "q")
        other = query.replace("block.0", "block.1")
        assert state[query].data_ptr() == dense[other].data_ptr()


def test_weights_outside_the_sublayers_forbid_new_pairs_only() -> None:
    model = tiny_model("bart")
    for block in model.model.decoder.layers:
        block.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    parts = describe(model)

    state = truncated_state(model, parts, plan_native(parts, keeping(BLOCKS)))
    assert "model.decoder.layers.1.scale" in state
    with pytest.raises(ExportError, match="block 0 holds 'scale' outside"):
        truncated_state(model, parts, plan_native(parts, keeping(REPAIRED)))


APART: dict[str, Any] = {
    "share_encoder_decoder_embeddings": False,
    "decoder_vocab_size": VOCAB - 20,
}


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("t5", {}),
        ("t5", {"tie_word_embeddings": False}),
        ("mt5", {}),
        ("bart", {}),
        ("bart", {"tie_word_embeddings": False}),
        ("marian", APART),
        ("marian", APART | {"tie_word_embeddings": False}),
    ],
)
def test_heads_and_embeddings_are_tied_as_in_the_loaded_model(
    model_type: str, settings: dict[str, Any], own_head: bool, tmp_path: Path
) -> None:
    tiny = tiny_model(model_type, **settings)
    tiny.save_pretrained(tmp_path / "base")
    if own_head:
        weights = load_file(tmp_path / "base" / "model.safetensors")
        weights["lm_head.weight"] = tiny.lm_head.weight.flip(0).contiguous()
        save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
    loaded = LoadedModel(
        model, tiny_tokenizer(), "owner/base", "abc", "0" * 64, model.dtype, model.device
    )

    parts, mask, ids = describe(model), keeping(REPAIRED), random_ids(model, SEVERAL)

    result = export(loaded, parts, mask, tmp_path / "small", check=False)

    again: Any = AutoModelForSeq2SeqLM.from_pretrained(result.path)
    with masked(model, parts, mask):
        expected = probe.run_pass(model, "prefill", ids, SEVERAL)
    assert torch.equal(probe.run_pass(again, "prefill", ids, SEVERAL), expected)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert again.num_parameters() == result.parameters
    for name in ("tie_word_embeddings", "scale_decoder_outputs"):
        assert getattr(again.config, name, None) == getattr(model.config, name, None)


def test_the_bias_of_the_logits_and_tables_of_positions_are_kept(tmp_path: Path) -> None:
    loaded, parts = tiny_loaded("marian")
    model = loaded.model
    model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    model.model.decoder.embed_positions.weight.mul_(1.5)

    path = export(loaded, parts, keeping(BLOCKS), tmp_path / "small", check=False).path

    again: Any = AutoModelForSeq2SeqLM.from_pretrained(path)
    assert torch.equal(again.final_logits_bias, model.final_logits_bias)
    for stack in ("encoder", "decoder"):
        tables = [getattr(m.model, stack).embed_positions.weight for m in (again, model)]
        assert torch.equal(*tables)


def test_the_manifest_tells_the_stacks_apart(tmp_path: Path) -> None:
    loaded, parts = tiny_loaded("t5")

    path = export(loaded, parts, keeping(NO_FIRST), tmp_path / "small", check=False).path

    manifest = json.loads((path / "depthsearch.json").read_text(encoding="utf-8"))
    assert manifest["blocks"] == [[1, 2], [3, 3], [1, 1, 2]]
    assert manifest["encoder_blocks"] == 2
    assert manifest["dropped"][:3] == ["encoder.0.attention", "encoder.0.ffn", "encoder.1.ffn"]
