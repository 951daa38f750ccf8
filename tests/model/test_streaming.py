"""The skeleton is the model without its weights, and the weights are found by name or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import tiny_ids, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from depthsearch.errors import ModelError, UnsupportedModelError
from depthsearch.model.families import FAMILIES
from depthsearch.model.replay import Replayer
from depthsearch.model.selfcheck import self_check
from depthsearch.model.streaming import StreamedModel

DTYPES = ("float32", "bfloat16")


def saved(folder: Path, family: str = "llama", **settings: Any) -> Path:
    shard = settings.pop("max_shard_size", "5GB")
    tiny_model(family, **settings).save_pretrained(folder, max_shard_size=shard)
    return folder


def loaded(folder: Path, dtype: str = "float32") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def opened(folder: Path, dtype: str = "float32") -> StreamedModel:
    return StreamedModel.open(folder, dtype, "cpu")


def rewritten(folder: Path, change: Any) -> None:
    """Exchange the weights for what `change` makes of them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_skeleton_and_every_part_are_those_of_the_loaded_model(
    family: str, dtype: str, tmp_path: Path
) -> None:
    theirs, ours = loaded(saved(tmp_path, family), dtype), opened(tmp_path, dtype)
    buffers = dict(ours.model.named_buffers())
    assert list(buffers) == [name for name, _ in theirs.named_buffers()]
    for name, buffer in theirs.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer)
    seen = equal_parameters(ours.model, theirs)
    parts = [ours.embeddings(), *(ours.block(i) for i in range(4)), ours.head()]
    for part in parts:
        with part:
            seen |= equal_parameters(ours.model, theirs)
    assert seen == {name for name, _ in theirs.named_parameters(remove_duplicate=False)}
    config = ours.model.config
    assert config._attn_implementation == theirs.config._attn_implementation
    assert not ours.model.training


def equal_parameters(ours: nn.Module, theirs: nn.Module) -> set[str]:
    """The names of parameters that are there; each must have the value of the loaded model's."""
    values = dict(theirs.named_parameters(remove_duplicate=False))
    there = {n: p for n, p in ours.named_parameters(remove_duplicate=False) if not p.is_meta}
    for name, value in there.items():
        assert value.dtype == values[name].dtype
        assert torch.equal(value, values[name])
        assert not value.requires_grad
    return set(there)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_blocks_are_given_needs_no_block(family: str, tmp_path: Path) -> None:
    theirs, ours = loaded(saved(tmp_path, family)), opened(tmp_path)
    ids = tiny_ids(2, 12)
    replayer = Replayer(ours.model, ours.anatomy)
    with ours.embeddings():
        first, calls = replayer.entry(ids)
    recording = Replayer(theirs, ours.anatomy).record(ids)
    assert torch.equal(first, recording.first)
    assert len(calls) == 4
    for (args, named), (other_args, other_named) in zip(calls, recording.calls, strict=True):
        assert len(args) == len(other_args)
        assert list(named) == list(other_named)
        for name, value in named.items():
            assert same(value, other_named[name])
    with ours.head():
        assert torch.equal(
            replayer.logits(recording.last[0]),
            Replayer(theirs, ours.anatomy).logits(recording.last[0]),
        )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_of_two_blocks_stands_for_the_model(family: str, tmp_path: Path) -> None:
    ours = opened(saved(tmp_path, family))
    blocks = list(ours.anatomy.block_list(ours.model))
    theirs = self_check(loaded(tmp_path), ours.anatomy)
    found = ours.check()
    assert (found.mode, found.replay_difference) == (theirs.mode, theirs.replay_difference)
    assert found.sites_checked == tuple(site.name for site in ours.anatomy.sites[:4])
    assert list(ours.anatomy.block_list(ours.model)) == blocks
    assert all(p.is_meta for block in blocks for p in block.parameters())


def test_shards(tmp_path: Path) -> None:
    theirs = loaded(saved(tmp_path, max_shard_size="100KB"))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    ours = opened(tmp_path)
    for index in range(4):
        with ours.block(index):
            assert len(equal_parameters(ours.model, theirs)) == 10  # nine, and the final norm


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_names_of_the_bare_model(family: str, tmp_path: Path) -> None:
    """As the hub has gpt2: saved without the head, so without the prefix."""
    prefix = {"gpt2": "transformer.", "llama": "model."}[family]
    saved(tmp_path, family, tie_word_embeddings=True)
    rewritten(tmp_path, lambda held: {n.removeprefix(prefix): v for n, v in held.items()})
    theirs, ours = loaded(tmp_path), opened(tmp_path)
    with ours.block(2), ours.head():
        assert len(equal_parameters(ours.model, theirs)) > 8


def test_tied_embeddings_stored_under_both_names(tmp_path: Path) -> None:
    saved(tmp_path, tie_word_embeddings=True)
    rewritten(
        tmp_path, lambda held: held | {"lm_head.weight": held["model.embed_tokens.weight"] + 1}
    )
    theirs, ours = loaded(tmp_path), opened(tmp_path)
    with ours.head():
        assert "lm_head.weight" in equal_parameters(ours.model, theirs)


def without(name: str) -> Any:
    return lambda held: {n: v for n, v in held.items() if n != name}


class TestRefused:
    @pytest.mark.parametrize(
        "name", ["model.layers.2.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"]
    )
    def test_a_missing_weight(self, name: str, tmp_path: Path) -> None:
        rewritten(saved(tmp_path), without(name))
        with pytest.raises(ModelError, match=rf"1 weights can't be found .*\({name}\)"):
            opened(tmp_path)

    def test_a_renamed_weight_is_not_guessed(self, tmp_path: Path) -> None:
        name = "model.layers.1.input_layernorm."
        rewritten(
            saved(tmp_path),
            lambda held: {n.replace(f"{name}weight", f"{name}gamma"): v for n, v in held.items()},
        )
        with pytest.raises(ModelError, match="can't be found by name"):
            opened(tmp_path)

    def test_a_weight_under_two_names(self, tmp_path: Path) -> None:
        rewritten(
            saved(tmp_path), lambda held: held | {"norm.weight": held["model.norm.weight"] + 1}
        )
        with pytest.raises(ModelError, match=r"model.norm.weight and as norm.weight"):
            opened(tmp_path)

    def test_another_shape(self, tmp_path: Path) -> None:
        rewritten(saved(tmp_path), lambda held: held | {"model.norm.weight": torch.ones(32)})
        with pytest.raises(ModelError, match=r"has shape \[32\], but .* asks for \[64\]"):
            opened(tmp_path)

    def test_a_number_format_that_needs_scales(self, tmp_path: Path) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        rewritten(saved(tmp_path), lambda held: held | {name: held[name].to(torch.float8_e4m3fn)})
        with pytest.raises(UnsupportedModelError, match="stored as F8_E4M3"):
            opened(tmp_path)

    def test_no_weights_or_no_config(self, tmp_path: Path) -> None:
        saved(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"no model\.safetensors"):
            opened(tmp_path)
        with pytest.raises(ModelError, match=r"no config\.json"):
            opened(tmp_path / "nothing")

    def test_a_cut_file(self, tmp_path: Path) -> None:
        file = saved(tmp_path) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(ModelError, match="damaged or cut short"):
            opened(tmp_path)

    def test_a_checkpoint_that_goes_away(self, tmp_path: Path) -> None:
        ours = opened(saved(tmp_path / "there"))
        shutil.rmtree(tmp_path / "there")
        with pytest.raises(ModelError, match="can't be read any more"), ours.block(0):
            pass
        assert all(p.is_meta for p in ours.model.model.layers.parameters())


def test_parts_are_given_back_on_an_error(tmp_path: Path) -> None:
    ours = opened(saved(tmp_path, "gemma3_text"))
    before = {name: id(module) for name, module in ours.model.named_modules()}
    for part in (ours.embeddings(), ours.block(1), ours.head()):
        with pytest.raises(RuntimeError, match="stop"), part:
            raise RuntimeError("stop")
    assert {name: id(module) for name, module in ours.model.named_modules()} == before
    left = [name for name, p in ours.model.named_parameters() if not p.is_meta]
    assert left == ["model.norm.weight"]
