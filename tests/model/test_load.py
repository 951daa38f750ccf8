from __future__ import annotations

import json
import logging

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PegasusConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from depthsearch.errors import ModelError, UnsupportedModelError
from depthsearch.model.load import fingerprint, load_model, resolve_device, resolve_dtype


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def checkpoint(dense, tmp_path):
    return save(dense, tmp_path / "model")


def save(model, path, **options):
    vocabulary = {"<unk>": 0, "<eos>": 1, **{chr(97 + i): i + 2 for i in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(path, **options)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(path)
    return path


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))


def fails(source, kind=ModelError, **options) -> str:
    with pytest.raises(kind) as caught:
        load_model(str(source), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_a_directory_loads_ready_to_evaluate_and_silently(checkpoint, dense, capfd):
    shown = transformers_logging.is_progress_bar_enabled()
    level = logging.getLogger("transformers").level
    capfd.readouterr()
    loaded = load_model(str(checkpoint), dtype="float32", device="cpu")
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled() == shown
    assert logging.getLogger("transformers").level == level
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer("a b")["input_ids"] == [2, 3]
    assert (loaded.dtype, loaded.device.type, loaded.revision) == (torch.float32, "cpu", None)
    assert loaded.source == str(checkpoint)
    for name, value in dense.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_asked_for_is_the_dtype_of_all_weights(checkpoint, dtype):
    loaded = load_model(str(checkpoint), dtype=dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.dtype == getattr(torch, dtype)


def test_automatic_choices_are_allowed_ones(checkpoint):
    loaded = load_model(str(checkpoint))
    assert loaded.dtype in (torch.float32, torch.bfloat16)
    assert loaded.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert next(loaded.model.parameters()).device.type == loaded.device.type


def test_unknown_device_and_dtype():
    with pytest.raises(ModelError, match="allowed: auto, float32"):
        resolve_dtype("int8", torch.device("cpu"))
    with pytest.raises(ModelError, match="allowed: auto, cpu"):
        resolve_device("abacus")
    with pytest.raises(ModelError, match="allowed: auto, cpu"):
        resolve_device("meta")
    with pytest.raises(ModelError, match="CUDA devices are visible"):
        resolve_device("cuda:99")


def test_fingerprint_follows_weights_and_config_only(checkpoint):
    first = fingerprint(checkpoint)
    edit_config(checkpoint, transformers_version="0.0.1", _name_or_path="elsewhere")
    (checkpoint / "notes.txt").write_text("x")
    assert fingerprint(checkpoint) == first
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    second = fingerprint(checkpoint)
    edit_config(checkpoint, rms_norm_eps=0.5)
    assert len({first, second, fingerprint(checkpoint)}) == 3


def test_sharded_checkpoints(dense, tmp_path):
    path = save(dense, tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2
    loaded = load_model(str(path))
    shards[1].rename(path / "gone")
    assert f"1 of {len(shards)} weight files are missing (first: {shards[1].name})" in fails(path)
    assert len(loaded.fingerprint) == 64
    for damaged in ('{"weight_map"', "[]", '{"weight_map": {"lm_head.weight": 3}}'):
        (path / "model.safetensors.index.json").write_text(damaged)
        assert "index.json can't be read" in fails(path)


@pytest.mark.parametrize("keep", [0, 50, -1000], ids=["empty", "cut header", "cut weights"])
def test_truncated_weights(checkpoint, keep, capfd):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    capfd.readouterr()
    assert "damaged or cut short" in fails(checkpoint)
    assert capfd.readouterr() == ("", "")


def test_weights_that_the_file_lacks_are_not_made_up(checkpoint, capfd):
    edit_config(checkpoint, num_hidden_layers=4)
    assert "9 weights that config.json asks for" in fails(checkpoint)
    assert capfd.readouterr() == ("", "")


def test_weights_of_other_shapes(checkpoint):
    edit_config(checkpoint, hidden_size=16)
    assert "other shapes than config.json says" in fails(checkpoint)


@pytest.mark.parametrize(
    "changes", [{"pad_token_id": 64}, {"num_attention_heads": 0}, {"num_key_value_heads": 0}]
)
def test_settings_that_no_model_can_be_made_of(checkpoint, changes):
    edit_config(checkpoint, **changes)
    assert "can't be loaded" in fails(checkpoint)


def test_config_without_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "no model.safetensors" in fails(checkpoint)


def test_no_config_and_damaged_config(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": ')
    assert "config.json" in fails(checkpoint)
    (checkpoint / "config.json").unlink()
    assert "has no config.json" in fails(checkpoint)


def test_no_tokenizer(checkpoint):
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    assert "no usable tokenizer" in fails(checkpoint)


def test_missing_paths_ask_no_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for source in ("./absent", "models/absent", "absent.gguf", str(tmp_path / "absent"), ""):
        assert "no such file or directory" in fails(source)
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "is a file" in fails(tmp_path / "model.bin")


@pytest.mark.parametrize("source", ["~nobody-of-that-name/x", "/" + "n" * 260, "n" * 260])
def test_paths_that_cant_be_looked_at(source):
    assert "can't be read (" in fails(source)


def test_the_hub_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "hub can't be reached" in fails("owner/name-that-no-cache-holds")


def test_a_hub_id_loads_from_the_hubs_cache(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub" / "models--owner--name"
    (home / "snapshots").mkdir(parents=True)
    checkpoint.rename(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = load_model("owner/name", dtype="float32")
    assert (loaded.source, loaded.revision) == ("owner/name", commit)
    assert loaded.fingerprint == fingerprint(home / "snapshots" / commit)
    assert load_model("owner/name", revision=commit).revision == commit
    assert "hub can't be reached" in fails("owner/name", revision="other")


def test_unknown_and_unsuitable_architectures(checkpoint):
    edit_config(checkpoint, model_type="martian")
    assert "martian" in fails(checkpoint, UnsupportedModelError)
    config = PegasusConfig(d_model=16, architectures=["PegasusForConditionalGeneration"])
    config.save_pretrained(checkpoint)
    message = fails(checkpoint, UnsupportedModelError)
    assert "PegasusForConditionalGeneration is an encoder-decoder" in message
    assert "bart, m2m_100, marian, mbart, mt5, t5" in message
    edit_config(checkpoint, model_type="vit", is_encoder_decoder=False, architectures=["ViTModel"])
    assert "decoder-only" in fails(checkpoint, UnsupportedModelError)


def test_quantized_checkpoints(checkpoint):
    edit_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantized (gptq)" in fails(checkpoint, UnsupportedModelError)


def test_remote_code_is_not_run_unasked(checkpoint):
    (checkpoint / "modeling.py").write_text("raise SystemExit('ran')\n")
    edit_config(
        checkpoint,
        model_type="martian",
        auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"},
    )
    assert "trust_remote_code" in fails(checkpoint)
