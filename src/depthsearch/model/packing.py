"""A loaded model as plain arrays and back, so that processes of a machine can share its memory.

Weights become numpy arrays without a copy; whoever gets them, read-only and mapped from shared
memory, builds the same model around them without a copy either.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from depthsearch.model.load import auto_class
from depthsearch.sources import quiet

_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PackedModel:
    """A model's configuration and its weights as integer arrays of the same width.

    `names[i]` are the parameters and persistent buffers that share `arrays[i]` (tied weights are
    stored once), `dtypes[i]` is their torch type.
    """

    config: str
    dtype: str
    attention: str
    names: tuple[tuple[str, ...], ...]
    dtypes: tuple[str, ...]
    arrays: tuple[NDArray[Any], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, tied ones once."""
        return sum(array.nbytes for array in self.arrays)


def pack(model: Any) -> PackedModel:
    """The weights of a transformers model on the CPU, sharing its memory."""
    groups: dict[tuple[int, torch.Size], list[str]] = {}
    tensors: dict[tuple[int, torch.Size], Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr(), tensor.shape)
        groups.setdefault(key, []).append(name)
        tensors[key] = tensor.detach()
    return PackedModel(
        config=json.dumps({"model_type": model.config.model_type, **model.config.to_dict()}),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=model.config._attn_implementation,
        names=tuple(tuple(names) for names in groups.values()),
        dtypes=tuple(str(t.dtype).removeprefix("torch.") for t in tensors.values()),
        arrays=tuple(
            t.contiguous().view(_BYTES[t.element_size()]).numpy() for t in tensors.values()
        ),
    )


def unpack(packed: PackedModel) -> Any:
    """The model around the arrays of `packed`, in evaluation mode, on the CPU, without a copy."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    entries = json.loads(packed.config)
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    with quiet(), init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(
            config,
            dtype=getattr(torch, packed.dtype),
            attn_implementation=packed.attention,
        )
    state: dict[str, Tensor] = {}
    for names, dtype, array in zip(packed.names, packed.dtypes, packed.arrays, strict=True):
        tensor = _tensor(array).view(getattr(torch, dtype))
        state |= dict.fromkeys(names, tensor)
    model.load_state_dict(state, assign=True, strict=True)
    # Each name has got a parameter of its own, which a move to a device would copy apart.
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _tensor(array: NDArray[Any]) -> Tensor:
    """A tensor on the memory of `array`, which nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(array))
