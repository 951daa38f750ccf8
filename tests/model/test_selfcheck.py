from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.tiny_models import MODEL_TYPES, PARALLEL_TYPES, tiny_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from depthsearch.errors import UnsupportedModelError
from depthsearch.model.anatomy import describe
from depthsearch.model.families import FAMILIES
from depthsearch.model.replay import Mode
from depthsearch.model.selfcheck import self_check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_passes_and_keeps_its_weights(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    check = self_check(model, describe(model))

    assert check.mode is (Mode.BLOCK if model_type in PARALLEL_TYPES else Mode.SITE)
    assert check.replay_difference == 0.0
    assert {"decoder.0.attention", "decoder.3.ffn"} <= set(check.sites_checked)
    assert check.to_json()["mode"] == str(check.mode)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("model_type", "wrong"),
    [
        # The norm after the attention taken for one of the FFN's.
        (
            "gemma2",
            {
                "attention_norms": ("input_layernorm",),
                "ffn_norms": ("post_attention_layernorm", "pre_feedforward_layernorm"),
            },
        ),
        ("olmo2", {"attention_norms": (), "ffn_norms": ("post_attention_layernorm",)}),
        # A projection that does not write to the residual stream.
        ("gpt2", {"attention_out": "c_attn"}),
        ("llama", {"ffn_out": "no_such_projection"}),
        # The sublayers exchanged.
        (
            "llama",
            {
                "attention": "mlp",
                "ffn": "self_attn",
                "attention_out": "down_proj",
                "ffn_out": "o_proj",
            },
        ),
    ],
    ids=["gemma2 norms", "olmo2 norms", "gpt2 projection", "llama projection", "llama exchanged"],
)
def test_a_wrong_row_is_refused_with_the_class_and_the_file(
    model_type: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, model_type, dataclasses.replace(FAMILIES[model_type], **wrong))
    model = tiny_model(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with pytest.raises(UnsupportedModelError, match=r"ForCausalLM|LMHeadModel") as caught:
        self_check(model, describe(model))

    assert "families.py" in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_block_that_does_more_than_its_sublayers_is_refused() -> None:
    class ShiftedLayer(LlamaDecoderLayer):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().forward(*args, **kwargs) + 0.5

    model = tiny_model("llama")
    for block in model.model.layers:
        block.__class__ = ShiftedLayer

    with pytest.raises(UnsupportedModelError, match="the block does more than"):
        self_check(model, describe(model))


def test_float16_beside_float32_is_refused_with_the_formats_to_take() -> None:
    model = tiny_model("t5", dtype=torch.float16)
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.wo.float()
    with pytest.raises(UnsupportedModelError, match=r"set model\.dtype to bfloat16 or float32"):
        self_check(model, describe(model))
