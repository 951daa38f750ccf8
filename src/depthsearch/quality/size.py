"""How large a model is: parameters, memory, disk, cache."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthsearch.errors import ModelError
from depthsearch.model.load import weight_files

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin")


@dataclass(frozen=True)
class Size:
    """Counts and bytes of one model; `disk_bytes` is None for a model that is not on disk.

    `kv_windowed` says that layers with a sliding window take part in `kv_bytes_per_token`, whose
    caches stop growing once it is full: a budget at a longer context counts less of them.
    """

    parameters: int
    memory_bytes: int
    disk_bytes: int | None
    kv_bytes_per_token: int
    kv_windowed: bool = False


def measure_size(model: Any, directory: str | Path | None = None) -> Size:
    """Measure `model`, and the weight files of the checkpoint in `directory` if one is given."""
    shorter, longer = _caches(model)
    return Size(
        parameters=count_parameters(model),
        memory_bytes=memory_bytes(model),
        disk_bytes=None if directory is None else disk_bytes(directory),
        kv_bytes_per_token=_bytes(longer) - _bytes(shorter),
        kv_windowed=any(getattr(layer, "is_sliding", False) for layer in longer),
    )


def count_parameters(model: Any) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def memory_bytes(model: Any) -> int:
    """Bytes of the storages behind parameters and buffers, shared ones counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in chain(model.parameters(), model.buffers())
    }
    return sum(storages.values())


def disk_bytes(checkpoint: str | Path) -> int:
    """Bytes of the weight files that are loaded from a checkpoint directory, or of one weight file.

    Raises ModelError where there are none.
    """
    path = Path(checkpoint)
    if path.is_file():
        return path.stat().st_size
    # Checkpoints often carry the same weights in other files and in older formats too.
    found = ([f for f in path.glob("*") if f.suffix == suffix] for suffix in WEIGHT_SUFFIXES)
    files: list[Path] = weight_files(path) or next((files for files in found if files), [])
    if not files:
        raise ModelError(
            f"{path}: holds no weights; give a directory with {', '.join(WEIGHT_SUFFIXES)} files"
        )
    return sum(file.stat().st_size for file in files)


def kv_bytes_per_token(model: Any) -> int:
    """Bytes by which the cache of one sequence grows with a token, measured on a short prompt.

    With an encoder-decoder it is one token read and one written. Layers with a sliding window stop
    growing once it is full, so for them this is the growth before that. State of fixed size
    (convolutions, state spaces) does not count.

    Raises ModelError for a model that returns no cache.
    """
    shorter, longer = _caches(model)
    return _bytes(longer) - _bytes(shorter)


def _caches(model: Any) -> tuple[list[Any], list[Any]]:
    """The cache's layers behind a prompt, and behind one that is a token longer."""
    return _cache_layers(model, 2), _cache_layers(model, 3)


def _bytes(layers: list[Any]) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in layers
        for tensor in vars(layer).values()
        if isinstance(tensor, Tensor)
    )


def _cache_layers(model: Any, tokens: int) -> list[Any]:
    """The layers of the cache behind a prompt of so many tokens."""
    device = next(model.parameters()).device
    ids = torch.ones(1, tokens, dtype=torch.int64, device=device)
    two = bool(getattr(model.config, "is_encoder_decoder", False))
    written = {"decoder_input_ids": ids} if two else {}
    with torch.no_grad():
        cache = getattr(model(input_ids=ids, **written, use_cache=True), "past_key_values", None)
    # That of an encoder-decoder is two, of what it has written and of what it has read.
    caches = [getattr(cache, f"{of}_attention_cache", None) for of in ("self", "cross")]
    found = [part for part in caches if part is not None] or [cache]
    if any(getattr(part, "layers", None) is None for part in found):
        raise ModelError(
            f"{type(model).__name__} returned a cache of type {type(cache).__name__}; its size "
            "can't be measured, only that of a transformers Cache"
        )
    return [layer for part in found for layer in part.layers]
