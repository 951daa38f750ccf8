from __future__ import annotations

import pytest
import torch

from depthsearch.errors import ModelError
from depthsearch.quality import measure_size
from depthsearch.quality.size import (
    count_parameters,
    disk_bytes,
    kv_bytes_per_token,
    memory_bytes,
)


def test_tied_weights_count_once(tiny):
    tied, untied = (tiny("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert count_parameters(untied) - count_parameters(tied) == 128 * 32
    assert memory_bytes(untied) - memory_bytes(tied) == 4 * 128 * 32
    per_block = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert count_parameters(tied) == 128 * 32 + 2 * per_block + 32


def test_memory_follows_the_dtype(tiny):
    model = tiny("llama")
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert memory_bytes(model) == 4 * count_parameters(model) + buffers
    half = memory_bytes(model.to(torch.bfloat16))
    assert 2 * count_parameters(model) <= half <= 2 * count_parameters(model) + buffers


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text"])
def test_kv_bytes_are_keys_and_values_of_all_blocks(family, tiny):
    model = tiny(family, num_hidden_layers=3)
    assert kv_bytes_per_token(model) == 3 * 2 * 2 * 8 * 4
    assert kv_bytes_per_token(model.to(torch.bfloat16)) == 3 * 2 * 2 * 8 * 2
    windowed = family in ("mistral", "gemma2", "gemma3_text")
    assert measure_size(model).kv_windowed == windowed


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_kv_bytes_without_shared_heads(family, tiny):
    assert kv_bytes_per_token(tiny(family)) == 2 * 2 * 32 * 4


def test_size_of_a_checkpoint(tiny, tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    one = measure_size(model, tmp_path / "one")
    assert one.disk_bytes == (tmp_path / "one" / "model.safetensors").stat().st_size
    assert disk_bytes(tmp_path / "one" / "model.safetensors") == one.disk_bytes
    shards = list((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 1
    assert disk_bytes(tmp_path / "many") == sum(file.stat().st_size for file in shards)
    assert measure_size(model).disk_bytes is None


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_weights_in_files_that_are_not_loaded_do_not_count(shards, tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path, max_shard_size=shards)
    loaded = disk_bytes(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "model.bin").write_bytes(b"x" * 1000)
    assert disk_bytes(tmp_path) == loaded


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no weights"):
        disk_bytes(tmp_path)


def test_a_model_without_cache(tiny):
    model = tiny("llama")
    inner = model.forward
    model.forward = lambda **kwargs: inner(**{**kwargs, "use_cache": False})
    with pytest.raises(ModelError, match="LlamaForCausalLM returned a cache of type NoneType"):
        kv_bytes_per_token(model)
