"""Streamed weights: memory, bytes read, and losses beside those of the resident model.

    python benchmarks/streaming.py [--blocks 24] [--hidden 1024] [--ffn 3712] [--out FILE]

Writes a random llama-like model with a small vocabulary to a temporary folder (about 1.5 GB in
float32 as it stands) and evaluates generations of masks on two batches, streamed in a process of
its own and in-process in another. Losses must be equal bit for bit. Prints one JSON document.

Memory is the process's largest resident set (VmHWM) at the end, less its resident set (VmRSS) after
all imports and before it opens the model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from depthsearch import __version__
from depthsearch.calibration.objectives import KLDivergence
from depthsearch.evaluation import InProcess, Streamed, UnitResult
from depthsearch.model.anatomy import describe
from depthsearch.model.load import fingerprint, weight_files
from depthsearch.model.replay import Mode
from depthsearch.model.streaming import StreamedModel
from depthsearch.space import Mask

VOCAB = 512
MASKS = 8
GENERATIONS = 2
BATCHES, SEQUENCES, WINDOW = 2, 2, 32


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=3712)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.part:
        print(json.dumps(PARTS[chosen.part](chosen)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        shape = [f"--{name}={getattr(chosen, name)}" for name in ("blocks", "hidden", "ffn")]

        def part(name: str) -> dict[str, Any]:
            command = [sys.executable, __file__, "--part", name, "--folder", scratch, *shape]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            return dict(json.loads(done.stdout))

        made = part("write")
        streamed, resident = part("streamed"), part("resident")
    losses = [side.pop("losses") for side in (streamed, resident)]
    over = streamed["peak_over_baseline_bytes"]
    result: dict[str, Any] = {
        "benchmark": "streaming",
        "signature": {
            "depthsearch": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "device": "cpu",
            "dtype": "float32",
            "model": made,
            "protocol": f"{GENERATIONS} generations of {MASKS} masks, each mask without a quarter "
            f"of the sublayers, on {BATCHES} batches of {SEQUENCES} windows of {WINDOW} random "
            "tokens, KL at 25 % of positions; memory is VmHWM at the end less VmRSS after imports",
            "seed": 0,
        },
        "streamed": streamed,
        "resident": resident,
        "losses_equal": losses[0] == losses[1],
        "streamed_peak_over_model_bytes": over / made["weight_bytes"],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n")


def write(chosen: argparse.Namespace) -> dict[str, Any]:
    """A random model in shards."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=chosen.hidden,
        intermediate_size=chosen.ffn,
        num_hidden_layers=chosen.blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(chosen.folder, max_shard_size="500MB")
    return {
        "class": type(model).__name__,
        "blocks": chosen.blocks,
        "parameters": model.num_parameters(),
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "files": len(weight_files(chosen.folder)),
        "fingerprint": fingerprint(chosen.folder),
    }


def streamed(chosen: argparse.Namespace) -> dict[str, Any]:
    """The generations with streamed weights, each in one pass."""
    baseline = status_bytes("VmRSS")
    start = time.perf_counter()
    model = StreamedModel.open(chosen.folder, "float32", "cpu")
    backend = Streamed(
        model, windows(), KLDivergence(), mode=Mode.SITE, batch_tokens=SEQUENCES * WINDOW
    )
    opened = time.perf_counter() - start
    body = sum(model.block_bytes) + model.head_bytes
    # The first generation needs the embeddings too, and the final norm has been read by now.
    needed, read = model.embedding_bytes + body + model.bytes_read, 0
    found: list[Any] = []
    reading: list[dict[str, Any]] = []
    for generation in range(GENERATIONS):
        start = time.perf_counter()
        units = backend.run_all(masks(chosen.blocks, generation))
        seconds = time.perf_counter() - start
        found.append([unit.losses for unit in units])
        reading.append(
            {
                "passes": backend.passes,
                "bytes_read": model.bytes_read - read,
                "bytes_needed": needed,
                "read_over_needed": (model.bytes_read - read) / needed,
                "seconds": seconds,
                "resident_after_over_baseline_bytes": status_bytes("VmRSS") - baseline,
            }
        )
        needed, read = body, model.bytes_read
    return {
        "losses": found,
        "open_s": opened,
        "block_bytes": max(model.block_bytes),
        "generations": reading,
        "baseline_bytes": baseline,
        "peak_over_baseline_bytes": status_bytes("VmHWM") - baseline,
    }


def resident(chosen: argparse.Namespace) -> dict[str, Any]:
    """The same generations with the whole model loaded."""
    baseline = status_bytes("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(chosen.folder, dtype=torch.float32).eval()
    backend = InProcess(
        model,
        describe(model),
        windows(),
        KLDivergence(),
        mode=Mode.SITE,
        batch_tokens=SEQUENCES * WINDOW,
    )
    found: list[Any] = []
    seconds: list[float] = []
    for generation in range(GENERATIONS):
        start = time.perf_counter()
        units: list[UnitResult] = [
            backend.run(batch, masks(chosen.blocks, generation)) for batch in range(BATCHES)
        ]
        seconds.append(time.perf_counter() - start)
        found.append([unit.losses for unit in units])
    return {
        "losses": found,
        "generations_s": seconds,
        "baseline_bytes": baseline,
        "peak_over_baseline_bytes": status_bytes("VmHWM") - baseline,
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "write": write,
    "streamed": streamed,
    "resident": resident,
}


def windows() -> torch.Tensor:
    """Random ids `[sequence, window]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCAB, (BATCHES * SEQUENCES, WINDOW), generator=generator)


def masks(blocks: int, generation: int) -> list[Mask]:
    """Random masks, each without a quarter of the sublayers."""
    rng = np.random.default_rng([0, generation])
    sites = 2 * blocks
    return [
        Mask.dropping(sites, rng.choice(sites, size=sites // 4, replace=False).tolist())
        for _ in range(MASKS)
    ]


def status_bytes(name: str) -> int:
    """A memory figure of this process, such as VmRSS, from /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
