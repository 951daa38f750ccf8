"""Convert a GGUF file once into a safetensors directory that every later load takes instead.

The directory is `<cache>/converted/<file name>-<first 16 digits of the file's sha256>`. It appears
by a rename, so that it exists means that it is complete. Weights are stored in bfloat16: those of a
quantized file carry little more precision than that, and float32 would be twice the size.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from depthsearch.errors import ModelError, StorageError
from depthsearch.sources import is_disk_full, one_line, quiet

CACHE_VARIABLE = "DEPTHSEARCH_CACHE"

_MAGIC = b"GGUF"
_PARTIAL = ".partial-"
_STALE_SECONDS = 24 * 3600
_LARGE_GEMMA2 = 46
"""Blocks of the one Gemma 2 whose query_pre_attn_scalar is not the width of its heads."""
_FOREIGN_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
    struct.error,
    StrictDataclassError,
)


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else $DEPTHSEARCH_CACHE, else depthsearch in the user's cache directory."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "depthsearch"


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that `path` is or holds; None for a directory of safetensors or of neither."""
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if not files or any(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise ModelError(
            f"{path}: holds {len(files)} GGUF files ({files[0].name}, {files[1].name}, ...); give "
            "the path of one (a model split over several files has to be merged first)"
        )
    return files[0]


def converted_gguf(file: Path, cache_dir: str | Path | None = None) -> Path:
    """The safetensors directory made from `file`, converting it unless that was done before.

    Raises ModelError for a file that is no readable GGUF model or when the `gguf` package is
    missing, StorageError when the cache can't be written.
    """
    try:
        with file.open("rb") as handle:
            if handle.read(len(_MAGIC)) != _MAGIC:
                raise ModelError(f"{file}: is not a GGUF file (it does not begin with GGUF)")
            handle.seek(0)
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{file}: can't be read ({one_line(error)})") from error
    home = cache_root(cache_dir) / "converted"
    target = home / f"{file.stem}-{digest[:16]}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{file}: GGUF files need one more package; pip install 'depthsearch[gguf]'"
        )
    try:
        home.mkdir(parents=True, exist_ok=True)
        _sweep(home)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=home))
    except OSError as error:
        raise StorageError(
            f"{home}: can't be written ({one_line(error)}); point {CACHE_VARIABLE} elsewhere"
        ) from error
    try:
        model, tokenizer = _read(file)
        _write(model, tokenizer, partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process finished the same conversion first
                raise
    except OSError as error:
        raise StorageError(
            f"{home}: the converted model can't be written ({one_line(error)}); free some space "
            f"or point {CACHE_VARIABLE} elsewhere"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _sweep(home: Path) -> None:
    """Remove what conversions that were killed have left, once no running one can own it."""
    for partial in home.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


def _read(file: Path) -> tuple[Any, Any]:
    """Model and tokenizer, free of the marks of quantization that `save_pretrained` refuses."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The dequantizer draws its progress bar straight on stderr and offers no switch for it.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            reader = GGUFReader(file)
            scaling = _rope_scaling(reader)
            loader: Any = AutoModelForCausalLM
            model, info = loader.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.bfloat16,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except _FOREIGN_ERRORS as error:
            raise ModelError(
                f"{file}: can't be read as a GGUF model ({one_line(error)}); check that the file "
                "is whole and its architecture one that transformers converts"
            ) from error
    if scaling is not None:
        raise ModelError(
            f"{file}: its rotary embeddings are scaled ({scaling}), which transformers does not "
            "read from GGUF files: give the model as safetensors"
        )
    if lost := _lost(reader, model):
        raise ModelError(
            f"{file}: {lost}, which transformers does not read from GGUF files: give the model as "
            "safetensors"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{file}: {len(missing)} weights are not in the file (first: {missing[0]}); give a "
            "whole model"
        )
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.to(torch.bfloat16), tokenizer


def _lost(reader: Any, model: Any) -> str | None:
    """What of the file is no part of the model that was read, None where nothing is known to be."""
    there = sum(tensor.name.endswith(".bias") for tensor in reader.tensors)
    read = sum(name.endswith(".bias") for name, _ in model.named_parameters())
    if there > read:
        return f"{there - read} of its {there} biases have no place in {type(model).__name__}"
    if model.config.model_type == "gemma2" and model.config.num_hidden_layers == _LARGE_GEMMA2:
        return "Gemma 2 of 27B scales its attention by the width of a head in the stream"
    return None


def _rope_scaling(reader: Any) -> str | None:
    """What the file says of a scaling of its rotary embeddings, None where they are not scaled."""

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    prefix = f"{value('general.architecture')}.rope"
    kind, factor = value(f"{prefix}.scaling.type"), value(f"{prefix}.scaling.factor")
    if factor is None:
        factor = value(f"{prefix}.scale_linear")
    if kind != "none" and (kind is not None or factor is not None) and factor != 1:
        return f"{kind or 'linear'}, factor {factor}"
    for tensor in reader.tensors:
        if tensor.name.startswith(("rope_freqs", "rope_factors")) and not (tensor.data == 1).all():
            return f"tensor {tensor.name}"
    return None


def _write(model: Any, tokenizer: Any, directory: Path) -> None:
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        except SafetensorError as error:
            if is_disk_full(error):
                raise OSError(one_line(error)) from error
            raise
