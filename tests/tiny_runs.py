"""A tiny checkpoint, a text and a run file beside each other, for tests of whole runs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml
from tests.tiny_models import save_tiny

from depthsearch.config import RunConfig, load_config

WORDS = [
    f"{stem}{ending}"
    for stem in ("mask", "block", "keep", "drop", "search", "lose")
    for ending in ("", "s", "er", "ing")
]

SETTINGS: dict[str, Any] = {
    "model": {"path": "model", "dtype": "float32", "device": "cpu"},
    "space": {"granularity": "sublayer", "budget": {"keep_params": 0.7, "of": "blocks"}},
    "calibration": {
        "text": "text.txt",
        "window_tokens": 16,
        "select_tokens": 256,
        "finals_tokens": 256,
        "heldout_tokens": 256,
        "batch_tokens": 64,
    },
    "search": {"method": "evolution", "max_evaluations": 40, "finalists": 3},
}


def write_text(path: Path, documents: int = 80, seed: int = 0) -> Path:
    """Documents of random words, blank lines between them."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=40)) for _ in range(documents)]
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


def write_workplace(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A checkpoint `model`, a `text.txt` and a `run.yaml` in `folder`; returns the run file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny(folder / "model", model_type)
    write_text(folder / "text.txt")
    return write_config(folder / "run.yaml", **changes)


def write_config(path: Path, **changes: Any) -> Path:
    """A run file with `SETTINGS`, sections replaced by `changes` where these are not mappings."""
    data = {**SETTINGS}
    for section, value in changes.items():
        merges = isinstance(value, dict) and isinstance(data.get(section), dict)
        data[section] = {**data[section], **value} if merges else value
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def workplace_config(folder: Path, **changes: Any) -> RunConfig:
    """The configuration of a workplace with some sections changed."""
    return load_config(write_config(folder / "changed.yaml", **changes))
