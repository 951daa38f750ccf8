from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from depthsearch.errors import ModelError, StorageError
from depthsearch.model.conversion import cache_root, converted_gguf, gguf_in
from depthsearch.model.load import load_model

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS = 4, 2


def rotated(weight, heads):
    """Rows in the order of llama.cpp, which rotates neighbours while transformers takes halves."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture
def file(dense, tmp_path):
    return written(dense, tmp_path / "source" / "Tiny.gguf")


def written(dense, path, more=None):
    """The model as a float32 GGUF file with a byte-level tokenizer; `more(writer)` adds to it."""
    path.parent.mkdir()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(dense.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(260)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [256 + i for i in range(256 - len(printable))]
    words = ["<bos>", "<eos>", *(chr(code) for code in printable + rest), "ab", "abc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, *[1] * 258])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = {name: value.float().numpy() for name, value in dense.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for block in range(2):
        for theirs, ours in names.items():
            weight = weights[f"model.layers.{block}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                weight = rotated(weight, HEADS if ours == "attn_q" else KV_HEADS)
            writer.add_tensor(f"blk.{block}.{ours}.weight", np.ascontiguousarray(weight))
    if more is not None:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("from_directory", [False, True])
def test_a_gguf_file_becomes_an_ordinary_checkpoint_once(
    file, dense, tmp_path, from_directory, capfd
):
    cache = tmp_path / "cache"
    source = file.parent if from_directory else file
    loaded = load_model(str(source), dtype="bfloat16", cache_dir=cache)
    assert capfd.readouterr() == ("", "")
    (directory,) = (cache / "converted").iterdir()
    assert directory.name.startswith("Tiny-")
    assert loaded.source == str(source)
    assert loaded.model.state_dict().keys() == dense.state_dict().keys()
    for name, value in dense.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.tokenizer.decode(loaded.tokenizer("abc cab")["input_ids"]) == "abc cab"
    assert loaded.tokenizer.eos_token_id == 1
    written = (directory / "model.safetensors").stat().st_mtime_ns
    again = load_model(str(file), dtype="bfloat16", cache_dir=cache)
    assert again.fingerprint == loaded.fingerprint
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    assert load_model(str(directory), dtype="bfloat16").fingerprint == loaded.fingerprint


def linear(writer, factor=8.0):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(factor)


def yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


def frequencies(writer, factor=8.0):
    writer.add_tensor("rope_freqs.weight", np.array([1, 1, factor, factor], np.float32))


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        (linear, r"\(linear, factor 8\.0\)"),
        (yarn, r"\(yarn, factor 4\.0\)"),
        (lambda writer: writer.add_float32("llama.rope.scale_linear", 2.0), "linear, factor 2"),
        (frequencies, "tensor rope_freqs.weight"),
    ],
)
def test_scaled_rotary_embeddings_are_refused(dense, tmp_path, scaling, said):
    """The model would be another one: nothing that reads such a file keeps the scaling."""
    file = written(dense, tmp_path / "scaled" / "Scaled.gguf", scaling)
    with pytest.raises(ModelError, match=f"Scaled.gguf: .*{said}.*give the model as safetensors"):
        converted_gguf(file, tmp_path / "cache")
    assert not list((tmp_path / "cache/converted").iterdir())


def test_biases_that_the_model_has_no_place_for_are_refused(dense, tmp_path):
    """transformers would drop them without a word, and every loss would be another model's."""

    def biased(writer):
        for block in range(2):
            writer.add_tensor(f"blk.{block}.attn_q.bias", np.ones(32, np.float32))

    file = written(dense, tmp_path / "biased" / "Biased.gguf", biased)
    with pytest.raises(ModelError, match="2 of its 2 biases have no place in LlamaForCausalLM"):
        converted_gguf(file, tmp_path / "cache")
    assert not list((tmp_path / "cache/converted").iterdir())


@pytest.mark.parametrize(
    "scaling", [lambda writer: linear(writer, 1.0), lambda writer: frequencies(writer, 1.0)]
)
def test_a_scaling_by_one_is_none(dense, tmp_path, scaling):
    file = written(dense, tmp_path / "scaled" / "Scaled.gguf", scaling)
    assert load_model(str(file), dtype="bfloat16", cache_dir=tmp_path / "cache").model is not None


def test_a_changed_file_of_the_same_name_is_converted_anew(file, tmp_path):
    cache = tmp_path / "cache"
    first = converted_gguf(file, cache)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert converted_gguf(file, cache) != first


def test_an_interrupted_conversion_leaves_nothing_that_counts(file, tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converted_gguf(file, cache)
    assert not list((cache / "converted").iterdir())
    assert (converted_gguf(file, cache) / "model.safetensors").is_file()


def test_leftovers_of_killed_conversions_go_after_a_day(file, tmp_path):
    home = tmp_path / "cache" / "converted"
    for name, age_s in ((".partial-old", 2 * 86400), (".partial-new", 60)):
        (home / name).mkdir(parents=True)
        os.utime(home / name, (time.time() - age_s,) * 2)
    converted_gguf(file, tmp_path / "cache")
    assert sorted(path.name for path in home.glob(".*")) == [".partial-new"]


@pytest.mark.parametrize("keep", [0, 3, 200, -500])
def test_damaged_files(file, tmp_path, keep, capfd):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError) as caught:
        load_model(str(file), cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not list((tmp_path / "cache").glob("converted/*"))


def test_the_missing_package_is_named(file, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(ModelError, match=r"pip install 'depthsearch\[gguf\]'"):
        converted_gguf(file, tmp_path / "cache")


def test_a_cache_that_cannot_be_written(file, tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(StorageError, match="DEPTHSEARCH_CACHE"):
        converted_gguf(file, tmp_path / "cache")


def test_which_file_of_a_directory_is_meant(file, tmp_path):
    assert gguf_in(file) == gguf_in(file.parent) == file
    (file.parent / "Other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="holds 2 GGUF files"):
        gguf_in(file.parent)
    (file.parent / "model.safetensors").write_bytes(b"")
    assert gguf_in(file.parent) is None
    assert gguf_in(tmp_path) is None


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DEPTHSEARCH_CACHE", raising=False)
    assert cache_root() == tmp_path / "depthsearch"
    monkeypatch.setenv("DEPTHSEARCH_CACHE", "/named")
    assert cache_root() == Path("/named")
    assert cache_root("/given") == Path("/given")


@pytest.mark.slow
def test_the_real_file(tmp_path):
    data = Path(os.environ.get("DEPTHSEARCH_DATA", ".data"))
    files = sorted(data.rglob("SmolLM2-135M-Instruct*.gguf"))
    if not files:
        pytest.skip("scripts/fetch has not brought SmolLM2")
    loaded = load_model(str(files[0]), cache_dir=tmp_path)
    assert loaded.model.config.num_hidden_layers == 30
    ids = torch.tensor([loaded.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        best = loaded.model(input_ids=ids.to(loaded.device)).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(best).strip() == "Paris"
