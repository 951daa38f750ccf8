from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.evaluation.tiny_backends import tiny_backend
from tests.tiny_models import keeping, save_tiny, tiny_ids, tiny_loaded, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from depthsearch.errors import ExportError, MaskError, ModelError, StorageError
from depthsearch.evaluation import Refitted
from depthsearch.export import CardData, Figure, export
from depthsearch.model.anatomy import describe
from depthsearch.model.families import FAMILIES
from depthsearch.model.load import load_model
from depthsearch.model.repair import patched
from depthsearch.model.switches import masked

PACKABLE = "11 10 01 11"


def test_a_checkpoint_on_disk_is_exported_checked_and_loaded_again(tmp_path: Path) -> None:
    loaded = load_model(str(save_tiny(tmp_path / "base", "qwen3")), dtype="bfloat16")
    anatomy, mask = describe(loaded.model), keeping(PACKABLE)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    config = loaded.model.config.to_dict()

    result = export(loaded, anatomy, mask, tmp_path / "small")

    assert result.verification is not None
    assert result.verification.passed
    assert result.verification.dtype == "bfloat16"
    assert result.plan.pairs == ((0, 0), (1, 2), (3, 3))
    assert loaded.model.config.to_dict() == config
    assert all(torch.equal(before[n], tensor) for n, tensor in loaded.model.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "small"]
    again = load_model(str(result.path), dtype="bfloat16")
    assert again.model.num_parameters() == result.parameters
    with torch.no_grad():
        with masked(loaded.model, anatomy, mask):
            expected = loaded.model(tiny_ids()).logits
        assert torch.equal(again.model(tiny_ids()).logits, expected)
    assert again.tokenizer("the mask")["input_ids"] == loaded.tokenizer("the mask")["input_ids"]
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template


def test_the_result_and_the_manifest_say_what_was_written(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama")

    result = export(loaded, anatomy, keeping(PACKABLE), tmp_path / "small", check=False)

    manifest = json.loads((result.path / "depthsearch.json").read_text(encoding="utf-8"))
    assert manifest["mask"] == "11100111"
    assert manifest["dropped"] == ["decoder.1.ffn", "decoder.2.attention"]
    assert len(manifest["kept"]) == 6
    assert manifest["blocks"] == [[0, 0], [1, 2], [3, 3]]
    assert manifest["base_model"] == {
        "source": "owner/tiny-llama", "revision": "abc", "fingerprint": "0" * 64,
    }  # fmt: skip
    assert manifest["dense_parameters"] == loaded.model.num_parameters()
    assert manifest["parameters"] == result.parameters < loaded.model.num_parameters()
    assert manifest["verification"] is None
    assert {
        "README.md", "config.json", "depthsearch.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "chat_template.jinja",
    } <= set(result.files)  # fmt: skip
    assert len({(result.path / name).stat().st_mode for name in result.files}) == 1
    assert result.disk_bytes == sum(f.stat().st_size for f in result.path.iterdir())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_an_export_of_repaired_weights_gives_the_repaired_logits(
    family: str, tmp_path: Path
) -> None:
    loaded, anatomy = tiny_loaded(family)
    mask = keeping("00 11 11 11")
    judge = tiny_backend(model=loaded.model)
    patches = Refitted(judge, tiny_ids(40, 12, seed=7), "sequential").repair(mask)

    result = export(loaded, anatomy, mask, tmp_path / "small", check=False, patches=patches)

    again = AutoModelForCausalLM.from_pretrained(result.path)
    with torch.no_grad(), masked(loaded.model, anatomy, mask):
        cut = loaded.model(tiny_ids()).logits
        with patched(loaded.model, anatomy, patches):
            repaired = loaded.model(tiny_ids()).logits
        assert torch.equal(again(tiny_ids()).logits, repaired)
    assert patches
    assert not torch.allclose(cut, repaired, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_head_of_its_own_is_exported_though_the_config_says_tied(
    model_type: str, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base", model_type, tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    (embeddings,) = (w for name, w in weights.items() if "embed_tokens" in name or "wte" in name)
    weights["lm_head.weight"] = embeddings.flip(0).contiguous()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    loaded = load_model(str(base), dtype="float32")
    assert loaded.model.config.tie_word_embeddings
    anatomy, mask = describe(loaded.model), keeping(PACKABLE)

    result = export(loaded, anatomy, mask, tmp_path / "small")

    assert result.verification is not None
    assert result.verification.passed
    assert loaded.model.config.tie_word_embeddings
    again = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32)
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, weights["lm_head.weight"])
    with torch.no_grad(), masked(loaded.model, anatomy, mask):
        expected = loaded.model(tiny_ids()).logits
        assert torch.equal(again(tiny_ids()).logits, expected)


def test_large_models_are_sharded(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama")
    mask = keeping(PACKABLE)

    result = export(loaded, anatomy, mask, tmp_path / "small", max_shard_bytes=150_000, check=False)

    shards = [name for name in result.files if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert "model.safetensors.index.json" in result.files
    assert all((result.path / name).stat().st_size < 160_000 for name in shards)
    again = AutoModelForCausalLM.from_pretrained(result.path)
    with torch.no_grad(), masked(loaded.model, anatomy, mask):
        assert torch.equal(again(tiny_ids()).logits, loaded.model(tiny_ids()).logits)


def test_generation_settings_are_kept_even_where_transformers_would_not_save_them(
    tmp_path: Path,
) -> None:
    loaded, anatomy = tiny_loaded("llama")
    loaded.model.generation_config.temperature = 0.6
    loaded.model.generation_config.eos_token_id = [2, 7]

    result = export(loaded, anatomy, keeping(PACKABLE), tmp_path / "small", check=False)

    settings = AutoModelForCausalLM.from_pretrained(result.path).generation_config
    assert settings.temperature == 0.6
    assert settings.eos_token_id == [2, 7]
    assert loaded.model.generation_config.temperature == 0.6


def test_an_existing_directory_is_left_alone(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama", 2)
    mask = keeping("11 00")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "empty").mkdir()

    with pytest.raises(ExportError, match="exists and is not empty"):
        export(loaded, anatomy, mask, tmp_path / "mine", check=False)
    with pytest.raises(ExportError, match="not an export of depthsearch"):
        export(loaded, anatomy, mask, tmp_path / "mine", check=False, overwrite=True)
    with pytest.raises(ExportError, match="is a file"):
        export(loaded, anatomy, mask, tmp_path / "file", check=False, overwrite=True)
    export(loaded, anatomy, mask, tmp_path / "empty", check=False)

    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "mine"]


def test_overwrite_replaces_an_earlier_export_whole(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama")
    out = tmp_path / "small"
    export(loaded, anatomy, keeping(PACKABLE), out, max_shard_bytes=150_000, check=False)
    with pytest.raises(ExportError, match="exists and is not empty"):
        export(loaded, anatomy, keeping("11 00 11 11"), out, check=False)

    result = export(loaded, anatomy, keeping("11 00 00 11"), out, overwrite=True, check=False)

    assert "model.safetensors" in result.files
    assert not any("-of-" in name for name in result.files)
    assert list(tmp_path.iterdir()) == [out]


def test_overwrite_through_a_link_replaces_what_it_leads_to(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama")
    out, link = tmp_path / "disk/small", tmp_path / "small"
    export(loaded, anatomy, keeping(PACKABLE), out, check=False)
    link.symlink_to(out)

    result = export(loaded, anatomy, keeping("11 00 00 11"), link, overwrite=True, check=False)

    assert result.path == out
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "small"]
    assert list(out.parent.iterdir()) == [out]
    assert len(result.plan.pairs) == 2
    assert json.loads((link / "config.json").read_text())["num_hidden_layers"] == 2


def test_the_base_model_is_not_overwritten(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama", 2)
    out = export(loaded, anatomy, keeping("11 11"), tmp_path / "base", check=False).path

    with pytest.raises(ExportError, match="is the base model itself"):
        export(
            replace(loaded, source=str(out)),
            anatomy, keeping("11 00"), out, overwrite=True, check=False,
        )  # fmt: skip
    (out / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ExportError, match="is the base model itself, or holds it"):
        export(
            replace(loaded, source=str(out / "model.gguf")),
            anatomy, keeping("11 00"), out, overwrite=True, check=False,
        )  # fmt: skip
    assert (out / "model.gguf").is_file()


def test_masks_without_a_native_form_leave_nothing(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama")

    with pytest.raises(ExportError, match="packable: true"):
        export(loaded, anatomy, keeping("11 10 11 11"), tmp_path / "deep" / "small")
    with pytest.raises(MaskError):
        export(loaded, anatomy, keeping("11"), tmp_path / "deep" / "small")

    assert list(tmp_path.iterdir()) == []


def test_a_class_with_its_own_code_is_refused(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama", 2)
    custom = type(
        "CustomForCausalLM", (LlamaForCausalLM,), {"__module__": "transformers_modules.x.modeling"}
    )
    loaded.model.__class__ = custom

    with pytest.raises(ExportError, match="CustomForCausalLM comes with its own code"):
        export(loaded, anatomy, keeping("11 00"), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


class ShiftedLayer(LlamaDecoderLayer):
    """A block that the checkpoint can't express."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs) + 0.5


def test_an_export_that_fails_its_check_is_set_aside(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama")
    for block in loaded.model.model.layers:
        block.__class__ = ShiftedLayer

    with pytest.raises(ExportError, match="does not equal the masked model") as caught:
        export(loaded, anatomy, keeping("11 00 11 11"), tmp_path / "small")

    assert "largest difference" in str(caught.value)
    assert str(tmp_path / "small.failed") in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["small.failed"]
    assert (tmp_path / "small.failed" / "config.json").is_file()
    assert not (tmp_path / "small.failed" / "depthsearch.json").exists()


class InterruptedTokenizer(PreTrainedTokenizerFast):
    """A tokenizer during whose saving the user presses Ctrl-C."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        raise KeyboardInterrupt


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama", 2)
    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = InterruptedTokenizer

    with pytest.raises(KeyboardInterrupt):
        export(
            replace(loaded, tokenizer=tokenizer), anatomy, keeping("11 00"), tmp_path / "a" / "b"
        )

    assert list(tmp_path.iterdir()) == []


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """The operating system refuses to let any file grow beyond `size_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_refused_write_is_one_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama", 2)

    with file_size_limit(100_000), pytest.raises(StorageError) as caught:
        export(loaded, anatomy, keeping("11 00"), tmp_path / "small", check=False)

    assert str(tmp_path / "small") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_cannot_be_measured_is_kept_and_says_so(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama")

    def measure(_: Path) -> tuple[Figure, ...]:
        raise ModelError("the memory of the dense model can't be measured")

    result = export(
        loaded, anatomy, keeping(PACKABLE), tmp_path / "small", check=False, measure=measure
    )

    assert result.unmeasured == "the memory of the dense model can't be measured"
    assert (result.path / "model.safetensors").is_file()
    assert (result.path / "depthsearch.json").is_file()


def test_figures_measured_on_the_checked_checkpoint_reach_its_card(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama")
    seen: list[Path] = []

    def measure(directory: Path) -> tuple[Figure, ...]:
        seen.append(directory)
        assert (directory / "model.safetensors").is_file()
        return (Figure("perplexity", 10.0, 12.5),)

    result = export(
        loaded, anatomy, keeping(PACKABLE), tmp_path / "small",
        CardData(figures=(Figure("loss", 0.0, 1.5),)), check=False, measure=measure,
    )  # fmt: skip

    assert len(seen) == 1
    text = (result.path / "README.md").read_text(encoding="utf-8")
    assert "| loss | 0 | 1.5 |\n| perplexity | 10 | 12.5 |" in text
