"""Tiny random models of families that differ in how they form logits and caches."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB = 128

_SHAPES = {
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}
_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def tiny():
    """Builds a random two-block model of a family, float32, vocabulary 128."""

    def build(family: str, **changes):
        torch.manual_seed(0)
        shape = {**_SHAPES.get(family, _LLAMA_LIKE), "vocab_size": VOCAB, **changes}
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**shape))
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20)  # spread the logits, else all tie
        return model.eval().requires_grad_(False)

    return build
