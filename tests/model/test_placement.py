"""A model spread over devices: where its parts go, and that nothing about its losses changes."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluation.tiny_backends import assorted_masks
from tests.model import imitated_devices
from tests.tiny_models import MODEL_TYPES, save_tiny, tiny_ids, tiny_model
from torch.utils import backend_registration
from transformers import DynamicCache

from depthsearch.calibration.objectives import KLDivergence
from depthsearch.errors import ModelError
from depthsearch.evaluation import InProcess
from depthsearch.model.anatomy import describe
from depthsearch.model.load import load_model, resolve_devices
from depthsearch.model.placement import Placement, place, plan_placement, to_device
from depthsearch.model.replay import Mode
from depthsearch.model.selfcheck import self_check

CPU, META = torch.device("cpu"), torch.device("meta")
GPUS = [torch.device("cuda", index) for index in range(4)]


def bytes_of(model: torch.nn.Module) -> int:
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def sizes(blocks: int) -> tuple[int, int]:
    """Bytes of one block of a tiny llama, and of all that is outside its blocks."""
    model = tiny_model("llama", blocks)
    one = bytes_of(describe(model).block_list(model)[0])
    return one, bytes_of(model) - blocks * one


def plan(blocks: int, *room: float) -> list[int]:
    """The index of the device of each block; `room` is in blocks, beside the ends on the first."""
    model = tiny_model("llama", blocks)
    one, ends = sizes(blocks)
    limits = {
        device: int(size * one) + (ends if place == 0 else 0)
        for place, (device, size) in enumerate(zip(GPUS, room, strict=False))
    }
    placement = plan_placement(model, describe(model), limits)
    assert placement.home == GPUS[0]
    return [device.index for device in placement.blocks]


@pytest.mark.parametrize(
    ("blocks", "room", "expected"),
    [
        (4, (2, 2), [0, 0, 1, 1]),
        (5, (1, 1.9, 3), [0, 1, 2, 2, 2]),
        (4, (0, 4), [1, 1, 1, 1]),
        (3, (0, 0, 3), [2, 2, 2]),
        (6, (90, 90, 90), [0, 1, 1, 1, 2, 2]),  # the first has the ends already
    ],
)
def test_blocks_go_whole_and_in_order_to_where_there_is_room(
    blocks: int, room: tuple[float, ...], expected: list[int]
) -> None:
    assert plan(blocks, *room) == expected


@pytest.mark.parametrize("room", [(4, 9), (3, 5, 2), (9, 1, 1, 9), (2.5, 2.5, 2.5)])
def test_devices_are_filled_as_evenly_as_whole_blocks_allow(room: tuple[float, ...]) -> None:
    """Against all ways to cut six blocks."""
    one, ends = sizes(6)

    def unevenness(counts: Sequence[int]) -> float:
        held = [count * one + (ends if place == 0 else 0) for place, count in enumerate(counts)]
        free = [int(r * one) + (ends if place == 0 else 0) for place, r in enumerate(room)]
        if any(h > f for h, f in zip(held, free, strict=True)):
            return math.inf
        return sum((h / f) ** 2 for h, f in zip(held, free, strict=True))

    ways = (w for w in itertools.product(range(7), repeat=len(room)) if sum(w) == 6)
    best = min(map(unevenness, ways))
    found = plan(6, *room)
    assert unevenness([found.count(device) for device in range(len(room))]) == pytest.approx(best)
    assert found == sorted(found)


@pytest.mark.parametrize("room", [(3, 0.9), (1.9, 1.9), (-0.1, 9)])
def test_weights_that_do_not_fit_in_whole_blocks_are_refused(room: tuple[float, ...]) -> None:
    with pytest.raises(ModelError, match=r"don't fit in whole blocks.*cuda:0.*cuda:1") as caught:
        plan(4, *room)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_tensor_is_placed_once_and_tied_weights_stay_tied(family: str) -> None:
    """The meta device stands for the second one: values go, places can be seen."""
    model = tiny_model(family)
    anatomy = describe(model)
    names = {name for name, _ in model.named_parameters()}
    place(model, anatomy, Placement(CPU, (CPU, META, META, CPU)))
    inside = {f"{anatomy.stack.path}.{index}." for index in (1, 2)}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device == (META if name.startswith(tuple(inside)) else CPU), name
    assert {name for name, _ in model.named_parameters()} == names
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_to_device_moves_what_is_nested_and_keeps_what_is_shared() -> None:
    shared, odd = torch.zeros(2), DynamicCache()
    value = ((shared, None), {"a": [shared, torch.ones(1)], "cache": odd, "n": 3, "flag": True})
    moved: Any = to_device(value, META)
    assert moved[0][0].device == moved[1]["a"][1].device == META
    assert moved[0][0] is moved[1]["a"][0]
    assert moved[0][1] is None
    assert moved[1]["cache"] is odd
    assert (moved[1]["n"], moved[1]["flag"]) == (3, True)
    assert type(moved[0]) is tuple
    assert type(moved[1]["a"]) is list
    assert shared.device == CPU
    same: Any = to_device(value, CPU)
    assert same[0][0] is shared


def test_to_device_remembers_over_several_calls() -> None:
    shared, seen = torch.zeros(2), dict[int, torch.Tensor]()
    first, second = (to_device((shared,), META, seen) for _ in range(2))
    assert first[0] is second[0]


@cache
def imitated(*families: str) -> Mapping[str, Mapping[str, Any]]:
    """Figures of each family by layout, from a process in which devices are imitated."""
    ended = subprocess.run(
        [sys.executable, "-m", imitated_devices.__name__, *families],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    figures: dict[str, dict[str, Any]] = json.loads(ended.stdout)
    return figures


IMITATED = ("llama", "gemma2", "gpt2", "cohere2")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends written in Python, by which devices are imitated",
)
@pytest.mark.parametrize("family", IMITATED)
def test_several_devices_change_no_bit_and_only_hidden_states_move(family: str) -> None:
    """On imitated devices, where an operation on tensors of two of them is an error."""
    figures = imitated(*IMITATED)[family]
    one = figures["one"]
    home = str(imitated_devices.A)
    for found in figures.values():
        assert found["same"], "replay differs from the masked forward pass"
        assert found["at"] == [home, home]
        for name in ("mode", "losses", "statuses", "cosine", "repaired", "logits"):
            assert found[name] == one[name], name
    places = {
        name: [home, *(str(device) for device in blocks[:3]), home]
        for name, blocks in imitated_devices.LAYOUTS.items()
    }
    state = [5, 12, 64]
    for name, path in places.items():
        # The last block is dropped, so the way home is from the one before.
        crossings = [[a, b, state] for a, b in itertools.pairwise(path) if a != b]
        assert figures[name]["moves"] == crossings, name


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda:0,cuda:0", "visible|different CUDA"),
        ("cpu,cpu", "different CUDA ones"),
        ("cpu,cuda:0", "visible|different CUDA"),
        ("cuda:0,cuda:99", "visible"),
        ("gpu,cpu", "allowed"),
    ],
)
def test_devices_that_cannot_share_a_model_are_refused(device: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        resolve_devices(device)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_two_gpus_give_the_losses_of_one(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    found = []
    for device in ("cuda:0", "cuda:0,cuda:1"):
        loaded = load_model(str(tmp_path), "bfloat16", device)
        assert loaded.devices == device
        anatomy = describe(loaded.model)
        mode = self_check(loaded.model, anatomy).mode
        windows = tiny_ids(5, 12)
        backend = InProcess(
            loaded.model, anatomy, windows, KLDivergence(), mode=mode, batch_tokens=24
        )
        units = [backend.run(batch, assorted_masks(8)) for batch in range(3)]
        written = loaded.model.generate(windows[:, :8].to("cuda:0"), max_new_tokens=8)
        found.append((mode, units, backend.hints(), written.tolist()))
    assert found[0] == found[1]
    assert found[0][0] is not Mode.WHOLE
