"""Write the small model's own files: config, weights, tokenizer, generation settings, licence."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging
from transformers.utils.hub import cached_file

from depthsearch.errors import ExportError
from depthsearch.export.native import NativePlan, truncated_state
from depthsearch.export.settings import truncated_config
from depthsearch.model.anatomy import Anatomy
from depthsearch.model.load import LoadedModel
from depthsearch.sources import is_path, quiet

_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def small_model(loaded: LoadedModel, anatomy: Anatomy, plan: NativePlan) -> Any:
    """The truncated model, of the family's own class, sharing its weights with the dense one.

    Its buffers have no values, so it can be saved but not run. Raises ExportError for a model
    whose class is not part of transformers.
    """
    dense = loaded.model
    family = type(dense)
    if family.__module__.partition(".")[0] != "transformers":
        raise ExportError(
            f"{family.__name__} comes with its own code ({family.__module__}), which a native "
            "export can't carry: load the model without trust_remote_code"
        )
    config = truncated_config(dense.config, plan)
    head = dense.get_output_embeddings()
    own_head = head is not None and head.weight is not dense.get_input_embeddings().weight
    if own_head and not anatomy.encoder_blocks:
        # A checkpoint may say that they are tied and hold a head of its own, which is then loaded.
        config.tie_word_embeddings = False
    state = truncated_state(dense, anatomy, plan)
    with torch.device("meta"):
        small: Any = family(config)
    if anatomy.encoder_blocks:
        # That setting ties the embeddings of both stacks too, and says how T5 scales its logits:
        # it stays, and what the loaded model does not tie is not tied here.
        small.all_tied_weights_keys = dict(dense.all_tied_weights_keys)
    names = set(small.state_dict()) - set(getattr(small, "all_tied_weights_keys", None) or {})
    if names != set(state):
        odd = sorted(names.symmetric_difference(state))
        raise ExportError(
            f"{family.__name__}: {len(odd)} weights of the small model don't match the kept ones "
            f"(first: {odd[0]}); this model has no native export yet"
        )
    small.load_state_dict(state, strict=False, assign=True)
    small.tie_weights(recompute_mapping=False)
    return small.eval()


def write_model(
    small: Any, loaded: LoadedModel, directory: Path, max_shard_bytes: int | str
) -> None:
    """Save the small model as safetensors, in shards where it is large.

    Beside it go the dense model's tokenizer, chat template and generation settings as they are.
    """
    with quiet(), _no_progress_bars():
        # Settings that transformers reads without complaint it may refuse to save (a temperature
        # without sampling is common), so the dense model's own are written past that check.
        small.generation_config = GenerationConfig()
        # Tables of positions that its class would compute anew are written as they are, too.
        small._keys_to_ignore_on_save = None
        small.save_pretrained(directory, max_shard_size=max_shard_bytes)
        settings = getattr(loaded.model, "generation_config", None) or GenerationConfig()
        settings.to_json_file(directory / "generation_config.json")
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(directory)
    # safetensors makes its files readable by their owner only, which would break sharing the model.
    mode = (directory / "config.json").stat().st_mode
    for file in directory.glob("*.safetensors"):
        file.chmod(mode)


def copy_licences(loaded: LoadedModel, directory: Path) -> None:
    """Copy the licence files of the base model, where its directory holds any."""
    base = base_directory(loaded)
    if base is None:
        return
    for pattern in _LICENCES:
        for file in sorted(base.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


def base_directory(loaded: LoadedModel) -> Path | None:
    """Where the files of the base model lie on this machine, if they do."""
    if is_path(loaded.source, (".gguf", ".safetensors")):
        path = Path(loaded.source).expanduser()
        folder = path.parent if path.is_file() else path
        return folder if folder.is_dir() else None
    try:
        config = cached_file(
            loaded.source, "config.json", revision=loaded.revision, local_files_only=True
        )
    except OSError:
        return None
    return None if config is None else Path(str(config)).parent


def directory_bytes(directory: Path) -> int:
    """The size of all files under `directory`."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
