"""Load a language model from the hub, a local directory or a GGUF file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from depthsearch.errors import ModelError, StorageError, UnsupportedModelError
from depthsearch.model.conversion import converted_gguf, gguf_in
from depthsearch.model.families import ENCODER_DECODERS
from depthsearch.model.placement import place_on
from depthsearch.sources import is_disk_full, is_path, one_line, quiet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_ENDS_BYTES = 1 << 20
_FOREIGN_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to evaluate, its tokenizer, and what names them in a signature."""

    model: Any
    tokenizer: Any
    source: str
    revision: str | None
    fingerprint: str
    dtype: torch.dtype
    device: torch.device
    folder: Path | None = None
    """Where its files lie: its directory, the converted GGUF, or the hub's cache."""

    @property
    def devices(self) -> str:
        """All devices that hold its weights, as `load_model` takes them; `device` is the first."""
        return ",".join(dict.fromkeys(str(weight.device) for weight in self.model.parameters()))


def load_model(
    path_or_id: str,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | Path | None = None,
) -> LoadedModel:
    """Load a model in evaluation mode, without gradients, together with its tokenizer.

    `path_or_id` is a hub id, a directory with config.json and safetensors files, a GGUF file, or a
    directory with exactly one GGUF file and no safetensors. A GGUF file is converted once, to
    bfloat16 safetensors under `cache_dir` (see `conversion`). `dtype` "auto" is bfloat16 on CUDA
    and on processors with bfloat16 instructions, else float32; `device` "auto" is CUDA if present,
    and "cuda:0,cuda:1" spreads the blocks over both, while all the rest is on the first. Weights
    are read from safetensors only, never from pickles.

    Raises ModelError (one line: what failed and what to do), UnsupportedModelError for an
    architecture that can't be loaded as a language model, StorageError on a full disk.
    """
    targets = resolve_devices(device)
    kind = resolve_dtype(dtype, targets[0])
    location: str | Path = path_or_id
    if is_path(path_or_id, (".gguf", ".safetensors")):
        location = _local(path_or_id, cache_dir)
    options = {} if isinstance(location, Path) else {"revision": revision}
    with loading_errors(path_or_id):
        model, missing = _model(location, kind, trust_remote_code, options)
        if missing:
            raise ModelError(
                f"{path_or_id}: {len(missing)} weights that config.json asks for are not in the "
                f"checkpoint (first: {missing[0]}); get the whole checkpoint, or the config that "
                "belongs to it"
            )
        model = place_on(model.eval().requires_grad_(False), targets)
    tokenizer = load_tokenizer(path_or_id, location, trust_remote_code, options)
    if isinstance(location, Path):
        folder, commit = location, None
    else:
        folder = _snapshot(location, options)
        commit = folder.name
    return LoadedModel(
        model, tokenizer, path_or_id, commit, fingerprint(folder), kind, targets[0], folder
    )


def checkpoint_folder(
    path_or_id: str, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The directory that holds the checkpoint: a GGUF file is converted, a hub id downloaded.

    Raises as `load_model` does.
    """
    if is_path(path_or_id, (".gguf", ".safetensors")):
        return _local(path_or_id, cache_dir)
    from huggingface_hub import snapshot_download

    with loading_errors(path_or_id):
        return Path(
            snapshot_download(
                path_or_id,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.model"],
            )
        )


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu", "cuda", "cuda:1" ... stands for on this machine."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ModelError(f"device is {device!r}; allowed: auto, cpu, cuda, cuda:<n>, mps, xpu")
    cards = torch.cuda.device_count() if chosen.type == "cuda" else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= cards:
        raise ModelError(f"device is {device!r}, but {cards} CUDA devices are visible; use auto")
    return chosen


def resolve_devices(devices: str) -> tuple[torch.device, ...]:
    """The devices of "cuda:0,cuda:1", or the one of what `resolve_device` takes."""
    found = tuple(resolve_device(device.strip()) for device in devices.split(","))
    if len(found) > 1 and (len(set(found)) < len(found) or any(d.type != "cuda" for d in found)):
        raise ModelError(f"device is {devices!r}; several are different CUDA ones: cuda:0,cuda:1")
    return found


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype for "auto", "float32", "bfloat16" or "float16" on `device`."""
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ModelError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and _cpu_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, Arm)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    words = set(flags.split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def fingerprint(directory: Path) -> str:
    """The sha256 that names the checkpoint in `directory`.

    It covers config.json (without the version of transformers that wrote it), and of every
    safetensors file the name, the size, and the first and last MiB: the header with each tensor's
    shape and place, and weights at both ends. A change confined to the middle of a file of more
    than 2 MiB that leaves its size and header as they were is not seen.
    """
    digest = hashlib.sha256()
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for written in ("transformers_version", "_name_or_path"):
        config.pop(written, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in weight_files(directory):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_ENDS_BYTES))
            handle.seek(max(_ENDS_BYTES, size - _ENDS_BYTES))
            digest.update(handle.read(_ENDS_BYTES))
    return digest.hexdigest()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads from `directory`, in order of name."""
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return []
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [directory / name for name in sorted(set(names))]


def _local(source: str, cache_dir: str | Path | None) -> Path:
    """The directory to load from, after converting a GGUF file where `source` is one."""
    try:
        path = Path(source).expanduser()
        if not source or not path.exists():
            raise ModelError(
                f"{source!r}: no such file or directory; give a checkpoint directory, a GGUF file, "
                "or a hub id such as owner/name"
            )
        gguf = gguf_in(path)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"{source}: can't be read ({one_line(error, 160)}); give a checkpoint that you may read"
        ) from error
    if gguf is not None:
        return converted_gguf(gguf, cache_dir)
    if path.is_file():
        raise ModelError(f"{source}: is a file; give the directory that holds config.json")
    if not (path / "config.json").is_file():
        raise ModelError(f"{source}: has no config.json; give the directory of a whole checkpoint")
    try:
        files = weight_files(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{source}: model.safetensors.index.json can't be read ({one_line(error)}); copy the "
            "checkpoint again"
        ) from error
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ModelError(
            f"{source}: {len(absent)} of {len(files)} weight files are missing (first: "
            f"{absent[0]}); copy the checkpoint again"
        )
    if not files:
        raise ModelError(
            f"{source}: has a config.json but no model.safetensors; weights are read from "
            "safetensors only, so save the model with save_pretrained() first"
        )
    return path


def _model(
    location: str | Path, dtype: torch.dtype, trust_remote_code: bool, options: dict[str, Any]
) -> tuple[Any, list[str]]:
    """The model and the names of parameters that no file holds."""
    config = supported_config(location, trust_remote_code, options)
    model, info = auto_class(config).from_pretrained(
        location,
        config=config,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    return model, sorted(info["missing_keys"])


def auto_class(config: Any) -> Any:
    """The class of transformers that makes a language model of `config`."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    two_stacks = getattr(config, "is_encoder_decoder", False)
    return AutoModelForSeq2SeqLM if two_stacks else AutoModelForCausalLM


def supported_config(
    location: str | Path, trust_remote_code: bool = False, options: dict[str, Any] | None = None
) -> Any:
    """The configuration of a checkpoint; raises UnsupportedModelError where it can't be used."""
    from transformers import AutoConfig

    options = options or {}
    config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code, **options)
    named = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if getattr(config, "is_encoder_decoder", False) and config.model_type not in ENCODER_DECODERS:
        known = ", ".join(sorted(ENCODER_DECODERS))
        raise UnsupportedModelError(
            f"{location}: {named} is an encoder-decoder of the model type '{config.model_type}'; "
            f"supported are decoder-only language models and the encoder-decoders {known}"
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = (
            quantized.get("quant_method")
            if isinstance(quantized, dict)
            else getattr(quantized, "quant_method", None)
        )
        raise UnsupportedModelError(
            f"{location}: {named} is quantized ({method}); use the checkpoint it was made from"
        )
    return config


def load_tokenizer(
    source: str, location: str | Path, trust_remote_code: bool, options: dict[str, Any]
) -> Any:
    """The tokenizer at `location`, shown to work; raises ModelError."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                location, trust_remote_code=trust_remote_code, **options
            )
            usable = len(tokenizer("a", add_special_tokens=False)["input_ids"]) > 0
    except _FOREIGN_ERRORS as error:
        raise ModelError(
            f"{source}: no usable tokenizer ({one_line(error, 160)}); put tokenizer.json and "
            "tokenizer_config.json of the model beside the weights"
        ) from error
    if not usable:
        raise ModelError(
            f"{source}: the tokenizer turns text into no token; put tokenizer.json and "
            "tokenizer_config.json of the model beside the weights"
        )
    return tokenizer


def _snapshot(repository: str, options: dict[str, Any]) -> Path:
    """Where the hub's cache keeps the files of `repository`: a directory named by the commit."""
    from transformers.utils.hub import cached_file

    config = cached_file(repository, "config.json", local_files_only=True, **options)
    return Path(str(config)).parent


@contextmanager
def loading_errors(source: str) -> Iterator[None]:
    """Load through transformers silently, and turn what it raises into one line."""
    import huggingface_hub
    import transformers

    bars: Any = transformers.utils.logging
    hub_bars: Any = huggingface_hub.utils
    shown, hub_hidden = bars.is_progress_bar_enabled(), hub_bars.are_progress_bars_disabled()
    with quiet():
        bars.disable_progress_bar()
        try:
            yield
        except _FOREIGN_ERRORS as error:
            raise _explained(source, error) from error
        finally:
            if shown:
                bars.enable_progress_bar()
            if hub_hidden:
                hub_bars.disable_progress_bars()


def _explained(source: str, error: BaseException) -> Exception:
    said = " ".join(str(error).split())
    if is_disk_full(error):
        return StorageError(f"{source}: the disk is full; free some space or move HF_HOME")
    if isinstance(error, SafetensorError):
        return ModelError(
            f"{source}: a weight file is damaged or cut short ({one_line(error)}); copy or "
            "download the checkpoint again"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return ModelError(
            f"{source}: does not fit on the device; use device cpu or a smaller dtype"
        )
    if "does not recognize this architecture" in said or "Unrecognized configuration class" in said:
        reason = said.split(" Model type should be")[0].split(" This could be")[0]
        return UnsupportedModelError(
            f"{source}: {reason.rstrip('. ')}; a decoder-only language model that this version of "
            "transformers knows is needed"
        )
    if "trust_remote_code" in said:
        return ModelError(
            f"{source}: runs its own Python code; set trust_remote_code if you trust its author"
        )
    if "connect to 'http" in said:
        return ModelError(
            f"{source}: the hub can't be reached and its cache does not hold the model; give a "
            "local directory, or unset HF_HUB_OFFLINE if the network is there"
        )
    if "gated repo" in said:
        return ModelError(f"{source}: access is restricted; accept its terms, then hf auth login")
    if "size mismatch" in said or "ignore_mismatched_sizes" in said:
        return ModelError(
            f"{source}: the weights have other shapes than config.json says; get the config that "
            "belongs to the weights"
        )
    if len(said) > 300:
        said = said[:297] + "..."
    return ModelError(f"{source}: can't be loaded ({type(error).__name__}: {said})")
