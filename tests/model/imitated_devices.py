"""Several devices imitated on the processor, which refuse each other's tensors as GPUs do.

Run as a program (the imitation changes torch for the whole process), it spreads a tiny model of
each family named over devices and prints, as JSON, what evaluating masks gave.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from tests.evaluation.tiny_backends import assorted_masks
from tests.tiny_models import keeping, tiny_ids, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from depthsearch.calibration.objectives import KLDivergence
from depthsearch.evaluation import InProcess, Refitted, Rescaled
from depthsearch.model.anatomy import describe
from depthsearch.model.placement import Placement, place
from depthsearch.model.replay import Replayer
from depthsearch.model.selfcheck import replay, self_check
from depthsearch.model.switches import masked

A, B, C = (torch.device("privateuseone", index) for index in range(3))
LAYOUTS = {"one": (A, A, A, A), "two": (A, A, B, B), "three": (B, C, C, A)}
MASK = keeping("11 01 10 00")
REPAIRS = ("sequential", "table", "rescaled")


class Imitated(Tensor):
    """A tensor that says it is on a device and holds its values on the processor."""

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> Imitated:
        made: Imitated = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), dtype=values.dtype, device=device
        )
        return made

    def __init__(self, values: Tensor, device: torch.device) -> None:
        self.values_here = values

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, dict(kwargs or {}), [])


class Devices(TorchDispatchMode):
    """Computes where the tensors say they are, and notes the moves from device to device."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[tuple[str, str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, dict(kwargs or {}), self.moves)


def compute(func: Any, args: Any, kwargs: dict[str, Any], moves: list[Any]) -> Any:
    """One operation of torch; raises RuntimeError where its tensors are on several devices."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    # A number may stay on the processor.
    there = {t.device for t in tensors if t.ndim or isinstance(t, Imitated)}
    asked = kwargs.get("device")
    if func is torch.ops.aten._to_copy.default:
        target = kwargs.pop("device", None) or args[0].device
        if target != args[0].device:
            moves.append((str(args[0].device), str(target), tuple(args[0].shape)))
    elif func is torch.ops.aten.copy_.default:
        target = args[0].device
    elif len(there) > 1:
        raise RuntimeError(f"{func}: tensors on {sorted(map(str, there))}")
    else:
        target = asked or (there.pop() if there else torch.device("cpu"))
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
    here_args, here_kwargs = tree_map_only(Imitated, lambda t: t.values_here, (args, kwargs))
    found = func(*here_args, **here_kwargs)
    if func._schema.is_mutable and isinstance(args[0], Imitated):
        return args[0]
    if target.type == "cpu":
        return found
    return tree_map_only(Tensor, lambda values: Imitated(values, target), found)


@torch.no_grad()
def figures(family: str, blocks: tuple[torch.device, ...]) -> dict[str, Any]:
    """Losses, hints, the check's mode, masked logits, and the moves of one replayed mask."""
    # GPT-2 indexes ids with a list to warn about padding, which the imitation can't.
    model = tiny_model(family, **({"pad_token_id": None} if family == "gpt2" else {}))
    anatomy = describe(model)
    with Devices() as devices:
        place(model, anatomy, Placement(A, blocks))
        mode = self_check(model, anatomy).mode
        windows = tiny_ids(5, 12)
        backend = InProcess(model, anatomy, windows, KLDivergence(), mode=mode, batch_tokens=24)
        unit, hints = backend.run(0, assorted_masks(8)), backend.hints()[0]
        repaired = {repair: after(repair, backend) for repair in REPAIRS}
        replayer = Replayer(model, anatomy)
        recording = replayer.record(windows.to(A))
        devices.moves.clear()
        hidden = replay(replayer, recording, MASK, mode)
        moves = list(devices.moves)
        same = torch.equal(hidden, replayer.whole(recording, MASK))
        with masked(model, anatomy, MASK):
            logits = model(input_ids=windows.to(A), use_cache=False).logits
    return {
        "mode": str(mode),
        "losses": unit.losses,
        "statuses": list(map(str, unit.statuses)),
        "cosine": hints.to_json(),
        "repaired": repaired,
        "logits": logits.values_here.tolist(),
        "at": [str(hidden.device), str(logits.device)],
        "same": same,
        "moves": moves,
    }


def after(repair: str, judge: InProcess) -> list[Any]:
    """Losses after a repair, whose gaps lie within a device and across two."""
    fit, masks = tiny_ids(20, 12, seed=7), [keeping("11 11 00 11"), keeping("11 00 10 11")]
    if repair == "rescaled":
        rescaled = Rescaled(judge, fit)
        return [[float(p.weight.norm()) for p in rescaled.repair(mask)] for mask in masks]
    if repair == "table":
        settings = {"mode": judge.mode, "batch_tokens": 24, "fit": fit}
        model, anatomy = judge.replayer.model, judge.replayer.anatomy
        backend: Any = InProcess(model, anatomy, tiny_ids(5, 12), KLDivergence(), **settings)
    else:
        backend = Refitted(judge, fit, "sequential")
    return list(backend.run(0, masks).losses)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend()
    found = {
        family: {name: figures(family, blocks) for name, blocks in LAYOUTS.items()}
        for family in sys.argv[1:]
    }
    sys.stdout.write(json.dumps(found))
