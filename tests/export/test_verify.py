from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import (
    MODEL_TYPES,
    PARALLEL_TYPES,
    SEQUENTIAL_TYPES,
    keeping,
    tiny_ids,
    tiny_loaded,
)

import depthsearch
from depthsearch.errors import ExportError
from depthsearch.export import Case, Verification, export, probe, verify_export, verify_exports

BLOCKS = "11 00 11 00 11"
PACKABLE = ("10 01 11 00 11", "00 10 00 01 11")
SEVERAL = 4
NARROW = ("llama", "gemma3_text", "cohere2")


def case(model_type: str, pattern: str, folder: Path, dtype: torch.dtype = torch.float32) -> Case:
    loaded, anatomy = tiny_loaded(model_type, 5, dtype=dtype)
    name = f"{model_type}-{pattern.replace(' ', '')}-{dtype}"
    result = export(loaded, anatomy, keeping(pattern), folder / name, check=False)
    return Case(loaded, anatomy, keeping(pattern), result.path)


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verification]:
    """Exports of every family, all checked in one clean interpreter, by directory name."""
    folder = tmp_path_factory.mktemp("exports")
    cases = [case(model_type, BLOCKS, folder) for model_type in MODEL_TYPES]
    cases += [
        case(model_type, pattern, folder) for model_type in SEQUENTIAL_TYPES for pattern in PACKABLE
    ]
    cases += [case(model_type, BLOCKS, folder, torch.bfloat16) for model_type in NARROW]
    found = verify_exports(cases, tiny_ids(rows=3, tokens=30), SEVERAL)
    return {c.path.name: v for c, v in zip(cases, found, strict=True)}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_whole_blocks_export_exactly_in_every_family(
    model_type: str, verified: dict[str, Verification]
) -> None:
    found = verified[f"{model_type}-{BLOCKS.replace(' ', '')}-torch.float32"]

    assert found.passed
    assert found.max_difference < 1e-5
    assert found.cached_max_difference < 1e-5
    assert found.argmax_agreement == 1.0
    assert found.generation_equal
    assert found.positions == 2 * 3 * 30 + (30 + 27 + 23)


@pytest.mark.parametrize("pattern", PACKABLE)
@pytest.mark.parametrize("model_type", SEQUENTIAL_TYPES)
def test_packable_masks_export_exactly_in_every_sequential_family(
    model_type: str, pattern: str, verified: dict[str, Verification]
) -> None:
    found = verified[f"{model_type}-{pattern.replace(' ', '')}-torch.float32"]

    assert found.passed
    assert max(found.max_difference, found.cached_max_difference) < 1e-5
    assert found.generation_equal


@pytest.mark.parametrize("model_type", NARROW)
def test_bfloat16_agrees_on_every_position(
    model_type: str, verified: dict[str, Verification]
) -> None:
    found = verified[f"{model_type}-{BLOCKS.replace(' ', '')}-torch.bfloat16"]

    assert found.dtype == "bfloat16"
    assert found.passed
    assert found.argmax_agreement == 1.0


def test_parallel_families_are_among_those_checked() -> None:
    assert set(PARALLEL_TYPES) == {"cohere", "cohere2"}


def edit_weights(path: Path, edit: str) -> None:
    state = load_file(path / "model.safetensors")
    if edit == "nudged":
        state["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.5
    elif edit == "missing":
        del state["model.layers.1.self_attn.q_proj.weight"]
    elif edit == "not finite":
        state["model.norm.weight"][3] = float("nan")
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, name: str, **values: object) -> None:
    data = json.loads((path / name).read_text(encoding="utf-8"))
    (path / name).write_text(json.dumps(data | values), encoding="utf-8")


def test_the_check_sees_what_is_wrong_with_an_export(tmp_path: Path) -> None:
    names = ("sound", "nudged", "missing", "not finite", "window", "tokenizer", "bfloat16")
    cases = {}
    for name in names:
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        model_type = "gemma3_text" if name == "window" else "llama"
        cases[name] = case(model_type, "11 10 01 11 11", tmp_path / name, dtype)
    for name in ("nudged", "missing", "not finite"):
        edit_weights(cases[name].path, name)
    edit_json(cases["window"].path, "config.json", layer_types=["full_attention"] * 4)
    (cases["tokenizer"].path / "chat_template.jinja").write_text("other", encoding="utf-8")
    edit_weights(cases["bfloat16"].path, "nudged")
    # A wrong pairing: the check compares with another mask than the exported one.
    names += ("other mask",)
    cases["other mask"] = replace(cases["sound"], mask=keeping("10 01 11 11 11"))

    found = dict(zip(names, verify_exports(list(cases.values()), new_tokens=4), strict=True))

    assert found["sound"].passed
    assert found["sound"].max_difference == found["sound"].cached_max_difference == 0.0
    assert not any(v.passed for name, v in found.items() if name != "sound")
    assert found["nudged"].max_difference > 1e-3
    assert found["nudged"].cached_max_difference > 1e-3
    assert "model.layers.1.self_attn.q_proj.weight" in found["missing"].loading_problems
    assert "missing or left over" in found["missing"].text
    assert found["tokenizer"].max_difference == 0.0
    assert "tokenizer differs" in found["tokenizer"].text
    assert found["window"].max_difference > 1e-3
    assert 0 < found["window"].differing <= found["window"].positions
    assert "positions not bit-equal" in found["window"].text
    assert not found["window"].loading_problems
    assert found["bfloat16"].argmax_agreement < 0.999


def test_a_fault_that_does_not_repeat_does_not_fail_a_sound_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = case("llama", BLOCKS, tmp_path)
    run_pass, calls = probe.run_pass, []

    def faulty_once(model: object, name: str, ids: torch.Tensor, steps: int) -> torch.Tensor:
        calls.append(name)
        logits: torch.Tensor = run_pass(model, name, ids, steps)
        return logits + 1 if len(calls) == 1 else logits

    monkeypatch.setattr(probe, "run_pass", faulty_once)
    found = verify_export(sound.loaded, sound.anatomy, sound.mask, sound.path, new_tokens=2)

    assert found.passed
    assert found.differing == 0
    assert calls == [*probe.PASSES, *probe.PASSES]


def test_an_export_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    broken = case("llama", BLOCKS, tmp_path)
    (broken.path / "model.safetensors").write_bytes(b"not a checkpoint")

    with pytest.raises(ExportError, match="plain transformers can't load") as caught:
        verify_export(broken.loaded, broken.anatomy, broken.mask, broken.path, new_tokens=2)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "end",
    [
        'raise RuntimeError("DefaultCPUAllocator: can not allocate memory")',
        "raise MemoryError",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_a_check_that_has_no_memory_does_not_blame_the_export(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = case("llama", BLOCKS, tmp_path)
    script = tmp_path / "probe.py"
    script.write_text(end, encoding="utf-8")
    monkeypatch.setattr(probe, "__file__", str(script))

    with pytest.raises(ExportError, match="not enough memory to check the export") as caught:
        verify_export(small.loaded, small.anatomy, small.mask, small.path, new_tokens=2)

    assert "\n" not in str(caught.value)


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    loaded, anatomy = tiny_loaded("llama", 2)

    with pytest.raises(ExportError, match=r"more than 17 tokens a row: got \(2, 10\)"):
        verify_export(loaded, anatomy, keeping("1111"), tmp_path, tokens=tiny_ids(2, 10))


def test_the_interpreter_of_the_check_cannot_import_depthsearch() -> None:
    script = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(Path(depthsearch.__file__).parents[1])!r})\n"
        f"probe = runpy.run_path({probe.__file__!r})\n"
        "assert not any(name.startswith('depthsearch') for name in sys.modules)\n"
        "sys.meta_path.insert(0, probe['_Blocker']())\n"
        "import depthsearch\n"
    )

    ended = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False
    )

    assert ended.returncode == 1
    assert "ImportError: depthsearch must not be needed" in ended.stderr


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({}, True),
        ({"max_difference": 9e-5, "generation_equal": False}, True),
        ({"max_difference": 2e-4}, False),
        ({"cached_max_difference": 2e-4}, False),
        ({"max_difference": float("nan")}, False),
        ({"generation_equal": False}, False),
        ({"tokenizer_equal": False}, False),
        ({"loading_problems": ("a.weight",)}, False),
        ({"dtype": "bfloat16", "max_difference": 0.5, "argmax_agreement": 0.9991}, True),
        ({"dtype": "bfloat16", "max_difference": 0.5, "argmax_agreement": 0.998}, False),
        ({"dtype": "bfloat16", "cached_max_difference": float("nan")}, False),
        ({"dtype": "float16", "cached_max_difference": float("inf")}, False),
    ],
)
def test_what_passes(change: dict[str, object], passes: bool) -> None:
    exact = Verification("float32", 0.0, 0.0, 0, 1.0, 100, True, True, ())

    assert replace(exact, **change).passed is passes  # type: ignore[arg-type]
