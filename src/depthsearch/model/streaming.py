"""A model whose weights stay on disk: one part of it is brought to the device at a time.

The skeleton has its parameters on the meta device and its buffers, such as rotary frequencies, for
real. Each parameter is found by its name in the checkpoint's safetensors files, or the checkpoint
is refused; nothing is converted but the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from depthsearch.errors import ModelError, UnsupportedModelError
from depthsearch.model.anatomy import Anatomy, describe
from depthsearch.model.load import (
    auto_class,
    loading_errors,
    resolve_device,
    resolve_dtype,
    supported_config,
    weight_files,
)
from depthsearch.model.selfcheck import SelfCheck, self_check
from depthsearch.sources import one_line

_LISTED = 3
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
_BYTES |= {"U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Stored:
    """Where one parameter of the skeleton lies: a file, the name in it, and its bytes there."""

    file: Path
    name: str
    size_bytes: int


class StreamedModel:
    """The skeleton of a checkpoint, and the weights of one part of it for as long as needed.

    Four kinds of parts: the embeddings (every `nn.Embedding` outside the blocks), each block, the
    head (the output projection; tied to the embeddings it is read from their tensor), and the
    rest, such as the final norm, which is small and stays. `bytes_read` counts the bytes of all
    tensors read so far, as they are stored.
    """

    def __init__(
        self, model: Any, stored: dict[str, Stored], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model = model
        self.anatomy: Anatomy = describe(model)
        self.device = device
        self.dtype = dtype
        self.bytes_read = 0
        self._stored = stored
        inside = f"{self.anatomy.stack.path}."
        modules = {name: module for name, module in model.named_modules() if name}
        self._head = next(n for n, m in modules.items() if m is model.get_output_embeddings())
        self._embeddings = [
            name
            for name, module in modules.items()
            if isinstance(module, nn.Embedding) and not name.startswith(inside)
        ]
        apart = (inside, *(f"{name}." for name in (self._head, *self._embeddings)))
        self._load([name for name in stored if not name.startswith(apart)])

    @classmethod
    def open(cls, folder: str | Path, dtype: str = "auto", device: str = "auto") -> StreamedModel:
        """The streamed model of the checkpoint in `folder` (config.json and safetensors files).

        `dtype` and `device` as for `load_model`. Raises ModelError where the checkpoint can't be
        read or lacks a parameter, UnsupportedModelError for a model without a row in the family
        table.
        """
        folder = Path(folder).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder}: has no config.json; weights are streamed from the directory of a whole "
                "checkpoint, so give that"
            )
        target = resolve_device(device)
        kind = resolve_dtype(dtype, target)
        with loading_errors(str(folder)):
            model = _skeleton(folder, kind)
            _place_buffers(model, target)
            return cls(model, _find(folder, model), target, kind)

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """The bytes of each block as stored."""
        return tuple(
            sum(self._stored[name].size_bytes for name in self._under([self._block(index)]))
            for index in range(self.anatomy.stack.blocks)
        )

    @property
    def embedding_bytes(self) -> int:
        """The bytes of the embeddings as stored."""
        return sum(self._stored[name].size_bytes for name in self._under(self._embeddings))

    @property
    def head_bytes(self) -> int:
        """The bytes of the output projection as stored, also where the embeddings share it."""
        return sum(self._stored[name].size_bytes for name in self._under([self._head]))

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """One block with its weights."""
        with self._present([self._block(index)]):
            yield

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """The embeddings with their weights; meanwhile the head returns its input."""
        with self._exchanged({self._head: nn.Identity()}), self._present(self._embeddings):
            yield

    @contextmanager
    def head(self) -> Iterator[None]:
        """The head with its weights; meanwhile the embeddings return zeros."""
        with ExitStack() as stack:
            for name in self._embeddings:
                width = self.model.get_submodule(name).embedding_dim
                absent = AbsentEmbedding(width, self.dtype)
                stack.enter_context(self._exchanged({name: absent}))
            stack.enter_context(self._present([self._head]))
            yield

    def check(self, blocks: int = 2) -> SelfCheck:
        """The self-check of the first `blocks` blocks, with the embeddings and head, all resident.

        Every block of a family is built alike, so that their mode stands for the whole model.
        Raises UnsupportedModelError as `self_check` does.
        """
        path = self.anatomy.stack.path
        first = nn.ModuleList(list(self.anatomy.block_list(self.model))[:blocks])
        parts = [*self._embeddings, self._head, *(self._block(i) for i in range(len(first)))]
        with self._exchanged({path: first}), self._present(parts):
            return self_check(self.model, describe(self.model))

    def _block(self, index: int) -> str:
        return f"{self.anatomy.stack.path}.{index}"

    def _under(self, parts: Sequence[str]) -> list[str]:
        starts = tuple(f"{part}." for part in parts)
        return [name for name in self._stored if name.startswith(starts)]

    @contextmanager
    def _exchanged(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        places = {name: self.model.get_submodule(name) for name in modules}
        try:
            for name, module in modules.items():
                _parent(self.model, name)._modules[_leaf(name)] = module
            yield
        finally:
            for name, module in places.items():
                _parent(self.model, name)._modules[_leaf(name)] = module

    @contextmanager
    def _present(self, parts: Sequence[str]) -> Iterator[None]:
        names = self._under(parts)
        empty = {name: _slots(self.model, name)[_leaf(name)] for name in names}
        try:
            self._load(names)
            yield
        finally:
            for name, value in empty.items():
                _slots(self.model, name)[_leaf(name)] = value

    def _load(self, names: Sequence[str]) -> None:
        """Read parameters by name. One file is mapped at a time, and only while it is read."""
        files: dict[Path, list[str]] = {}
        for name in names:
            files.setdefault(self._stored[name].file, []).append(name)
        for file, inside in files.items():
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in inside:
                        slots, leaf = _slots(self.model, name), _leaf(name)
                        value = self._placed(handle.get_tensor(self._stored[name].name))
                        if isinstance(slots[leaf], nn.Parameter):
                            value = nn.Parameter(value, requires_grad=False)
                        slots[leaf] = value
                        self.bytes_read += self._stored[name].size_bytes
            except torch.OutOfMemoryError as error:
                size = sum(self._stored[name].size_bytes for name in names)
                raise ModelError(
                    f"{inside[0]}: {size:,} bytes of weights do not fit on {self.device} beside "
                    "what is there; use smaller batches or device cpu"
                ) from error
            except (OSError, SafetensorError) as error:
                raise ModelError(
                    f"{file}: can't be read any more ({one_line(error)}); restore the checkpoint"
                ) from error

    def _placed(self, value: Tensor) -> Tensor:
        """A copy in the model's dtype on the device; `value` is a view of a mapped file."""
        dtype = self.dtype if value.is_floating_point() else value.dtype
        if self.device.type == "cuda":
            return value.to(dtype).pin_memory().to(self.device, non_blocking=True)
        return value.to(self.device, dtype, copy=True)


class AbsentEmbedding(nn.Module):
    """Zeros `[..., width]` in place of embeddings that nobody looks at."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width = width
        self._dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros((*ids.shape, self._width), dtype=self._dtype, device=ids.device)


def _skeleton(folder: Path, dtype: torch.dtype) -> Any:
    """The model that config.json describes: parameters on the meta device, buffers for real."""
    config = supported_config(folder)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{folder.name} is an encoder-decoder, whose blocks can't be streamed: set "
            "model.streamed to false"
        )
    factory = auto_class(config)
    with init_empty_weights(include_buffers=False):
        model = factory.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _place_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _find(folder: Path, model: Any) -> dict[str, Stored]:
    """Where every parameter and saved buffer of `model` lies in the checkpoint."""
    held: dict[str, Stored] = {}
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                view = handle.get_slice(name)
                shapes[name], kind = view.get_shape(), view.get_dtype()
                if kind not in _BYTES:
                    raise UnsupportedModelError(
                        f"{folder}: {name} is stored as {kind}; allowed: {', '.join(_BYTES)}; use "
                        "the checkpoint it was made from"
                    )
                held[name] = Stored(file, name, math.prod(shapes[name]) * _BYTES[kind])
    if not held:
        raise ModelError(
            f"{folder}: has no model.safetensors; weights are read from safetensors only, so save "
            "the model with save_pretrained() first"
        )
    skeleton = model.state_dict(keep_vars=True)
    twins: dict[int, list[str]] = {}
    for name, value in skeleton.items():
        twins.setdefault(id(value), []).append(name)
    found: dict[str, Stored] = {}
    absent: list[str] = []
    for name, value in skeleton.items():
        candidates = _stored_names(name, model.base_model_prefix, held)
        if not candidates:  # tied: the tensor is stored under another of its names
            candidates = [
                stored
                for twin in twins[id(value)]
                for stored in _stored_names(twin, model.base_model_prefix, held)
            ]
        if not candidates:
            absent.append(name)
            continue
        if len(candidates) > 1:
            raise ModelError(
                f"{folder}: holds {name} as {' and as '.join(candidates)}; keep one of them"
            )
        if shapes[candidates[0]] != list(value.shape):
            raise ModelError(
                f"{folder}: {candidates[0]} has shape {shapes[candidates[0]]}, but config.json "
                f"asks for {list(value.shape)}; get the config that belongs to the weights"
            )
        found[name] = held[candidates[0]]
    if absent:
        listed = ", ".join(absent[:_LISTED]) + (", ..." if len(absent) > _LISTED else "")
        raise ModelError(
            f"{folder}: {len(absent)} weights can't be found by name in the checkpoint ({listed}); "
            "get the whole checkpoint, or load and save it once with this version of transformers"
        )
    return found


def _stored_names(name: str, prefix: str, held: dict[str, Stored]) -> list[str]:
    """The names under which `held` has a parameter: its own, or without or with `prefix`."""
    short = name.removeprefix(f"{prefix}.")
    return [n for n in dict.fromkeys((name, short, f"{prefix}.{name}")) if n in held]


def _slots(model: nn.Module, name: str) -> dict[str, Any]:
    """The dictionary of a module that holds the parameter or buffer `name`."""
    module = _parent(model, name)
    slots: dict[str, Any] = (
        module._parameters if _leaf(name) in module._parameters else (module._buffers)
    )
    return slots


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
