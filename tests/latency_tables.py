"""Latency tables written by hand, for models of which no time was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from depthsearch.model.load import fingerprint

ATTENTION, FFN, FIXED = 1_000_000, 3_000_000, 2_000_000
"""Nanoseconds; a dense model of four blocks takes 18 ms."""


def table_data(blocks: int = 4, fingerprint: str = "0" * 64, **changes: Any) -> dict[str, Any]:
    """A table of equal blocks as its file holds it; `changes` go into the signature."""
    sites = [
        {
            "name": f"decoder.{block}.{kind}",
            "ns": ns,
            "measured_ns": ns,
            "quartiles_ns": [ns, ns],
        }
        for block in range(blocks)
        for kind, ns in (("attention", ATTENTION), ("ffn", FFN))
    ]
    total = blocks * (ATTENTION + FFN) + FIXED
    return {
        "latency_table": 1,
        "signature": {
            "depthsearch": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "python": "3.11.7",
            "model": {"source": "model", "revision": None, "fingerprint": fingerprint},
            "model_class": "LlamaForCausalLM",
            "dtype": "float32",
            "device": "cpu",
            "device_name": "a machine elsewhere",
            "threads": 1,
            "context_tokens": 64,
            "repeats": 50,
            "protocol": "written by hand",
        }
        | changes,
        "sites": sites,
        "shared": [],
        "fixed": {"ns": FIXED, "quartiles_ns": [FIXED, FIXED]},
        "whole": {"ns": total, "quartiles_ns": [total, total]},
        "interrupted": 0.0,
    }


def write_table(path: Path, model: Path, **changes: Any) -> Path:
    """Such a table for the checkpoint in `model`."""
    path.write_text(json.dumps(table_data(fingerprint=fingerprint(model), **changes)))
    return path
