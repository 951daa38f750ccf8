"""One model over several devices: whole blocks in runs, everything else on the first device.

What enters a block is moved to it by a hook of torch, which views of the block share (accelerate's
hooks exchange `forward`, so that a view would run the block it was made from). What leaves the last
block is moved back to the first device, where the embeddings, the final norm and the head are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthsearch.errors import ModelError
from depthsearch.model.anatomy import Anatomy, describe


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model lie: `blocks[i]` for block i, `home` for what is outside them."""

    home: torch.device
    blocks: tuple[torch.device, ...]


def place_on(model: Any, devices: Sequence[torch.device]) -> Any:
    """The model, moved to one device or spread over several by the memory that is free there.

    Raises ModelError where the weights don't fit, UnsupportedModelError for a model that is spread
    but has no row in the family table.
    """
    if len(devices) == 1:
        return model.to(devices[0])
    anatomy = describe(model)
    room = {device: torch.cuda.mem_get_info(device)[0] for device in devices}
    place(model, anatomy, plan_placement(model, anatomy, room))
    return model


def plan_placement(
    model: nn.Module, anatomy: Anatomy, room: Mapping[torch.device, int]
) -> Placement:
    """The placement on devices with `room` bytes each that fills them most evenly.

    The first device is home. Blocks stay whole and in order, so that hidden states change devices
    as rarely as can be. Raises ModelError where the weights don't fit.
    """
    blocks = [_bytes(block) for block in anatomy.block_list(model)]
    home = _bytes(model) - sum(blocks)
    devices = list(room)
    runs = _even_runs(blocks, [room[device] for device in devices], home)
    if runs is None:
        free = ", ".join(f"{room[device]:,} on {device}" for device in devices)
        raise ModelError(
            f"{anatomy.model_class}: {home + sum(blocks):,} bytes of weights don't fit in whole "
            f"blocks into the bytes that are free: {free}; use more devices, a smaller model.dtype "
            "or model.streamed"
        )
    return Placement(
        devices[0],
        tuple(device for device, count in zip(devices, runs, strict=True) for _ in range(count)),
    )


def place(model: nn.Module, anatomy: Anatomy, placement: Placement) -> None:
    """Move every part to its device, once, and have hidden states follow from now on."""
    blocks = anatomy.block_list(model)
    inside = {id(part) for part in blocks.modules()}
    _move([part for part in model.modules() if id(part) not in inside], placement.home)
    for block, device in zip(blocks, placement.blocks, strict=True):
        _move(list(block.modules()), device)
        block.register_forward_pre_hook(_ToBlock(device), with_kwargs=True)
    blocks[-1].register_forward_hook(_ToHome(placement.home))


def block_devices(blocks: nn.ModuleList) -> tuple[torch.device, ...]:
    """The device of each block."""
    return tuple(next(block.parameters()).device for block in blocks)


def to_device(value: Any, device: torch.device, seen: dict[int, Tensor] | None = None) -> Any:
    """`value` with all tensors in its tuples, lists and dictionaries on `device`.

    Anything else in it, such as a cache, stays the same object. `seen` remembers what became of
    which tensor, so that what several calls share stays shared; its tensors must outlive it.
    """
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.to(device)
        return seen[id(value)]
    if type(value) in (tuple, list):
        return type(value)(to_device(part, device, seen) for part in value)
    if type(value) is dict:
        return {name: to_device(part, device, seen) for name, part in value.items()}
    return value


class _ToBlock:
    """A pre-hook that moves what a block is called with to its device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        return to_device((args, kwargs), self._device)  # type: ignore[no-any-return]


class _ToHome:
    """A hook that moves what a block returns to the home device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        return to_device(output, self._device)


def _even_runs(blocks: Sequence[int], room: Sequence[int], home: int) -> list[int] | None:
    """How many blocks each device gets, in order; None where they don't fit.

    Of all ways to cut the blocks into runs, the one with the least sum of squares of the shares of
    `room` that are filled, by dynamic programming over devices. Device 0 holds `home` bytes anyway.
    """
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    best += [(math.inf, [])] * len(blocks)
    for place, free in enumerate(room):
        held = home if place == 0 else 0
        after: list[tuple[float, list[int]]] = []
        for end in range(len(blocks) + 1):
            found: tuple[float, list[int]] = (math.inf, [])
            size = held
            for start in range(end, -1, -1):
                if start < end:
                    size += blocks[start]
                if size > free:
                    break
                cost = best[start][0] + (size / free) ** 2 if free > 0 else best[start][0]
                if cost < found[0]:
                    found = (cost, [*best[start][1], end - start])
            after.append(found)
        best = after
    cost, runs = best[-1]
    return None if math.isinf(cost) else runs


def _bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    held = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def _move(modules: Sequence[nn.Module], device: torch.device) -> None:
    """Move the modules' own tensors; tied ones stay tied, and each is freed when it is moved."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for module in modules:
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for slots in held:
            for name, value in slots.items():
                if value is None:
                    continue
                if id(value) not in moved:
                    there = value.detach().to(device)
                    if isinstance(value, nn.Parameter):
                        there = nn.Parameter(there, requires_grad=value.requires_grad)
                    moved[id(value)] = (value, there)
                slots[name] = moved[id(value)][1]
