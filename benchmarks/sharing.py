"""Prefix sharing against plain masked forward passes: the saving counted, and on the clock.

    python benchmarks/sharing.py MODEL TEXT [--out FILE]

Runs a greedy step (every single removal of the dense model) and a generation of 32 offspring of one
mask, each with shared prefixes and as plain masked forward passes, in turns in one run. Losses must
be equal bit for bit. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import transformers

from depthsearch import __version__
from depthsearch.calibration.objectives import KLDivergence
from depthsearch.calibration.text import load_documents
from depthsearch.calibration.windows import make_splits
from depthsearch.evaluation import InProcess, executed_sites
from depthsearch.model.anatomy import describe
from depthsearch.model.costs import cost_table
from depthsearch.model.load import load_model
from depthsearch.model.replay import Mode
from depthsearch.model.selfcheck import self_check
from depthsearch.space import Mask, SiteCosts

OFFSPRING = 32


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--column", default=None)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the one batch")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    loaded = load_model(chosen.model)
    anatomy = describe(loaded.model)
    check = self_check(loaded.model, anatomy)
    documents = load_documents(chosen.text, chosen.column)
    splits = make_splits(
        documents, loaded.tokenizer, chosen.window, chosen.tokens, 0, 0, 0.25, seed=0
    )
    flops = cost_table(loaded.model, anatomy, chosen.window).of("flops")
    shared, plain = (
        InProcess(
            loaded.model,
            anatomy,
            splits.select,
            KLDivergence(),
            mode=mode,
            batch_tokens=chosen.tokens,
            seed=0,
        )
        for mode in (check.mode, Mode.WHOLE)
    )
    cases = {
        "greedy_step": greedy_step(len(anatomy.sites)),
        "offspring": offspring(len(anatomy.sites)),
    }
    result: dict[str, Any] = {
        "benchmark": "sharing",
        "signature": {
            "depthsearch": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "device": str(loaded.device),
            "dtype": str(loaded.dtype),
            "model": {"name": Path(loaded.source).name, "fingerprint": loaded.fingerprint},
            "data": splits.fingerprint,
            "protocol": f"one batch of {chosen.tokens} tokens in windows of {chosen.window}, "
            f"KL at 25 % of positions, median of {chosen.repeats} turns",
            "seed": 0,
        },
        "replay": str(check.mode),
        "cases": {
            name: measure(shared, plain, masks, flops, chosen.repeats)
            for name, masks in cases.items()
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n")


def greedy_step(sites: int) -> list[Mask]:
    """Every single removal of the dense model."""
    return [Mask.dropping(sites, [i]) for i in range(sites)]


def offspring(sites: int) -> list[Mask]:
    """Swaps of one dropped with one kept site around a mask that drops a quarter in one run."""
    rng = np.random.default_rng(0)
    parent = Mask.dropping(sites, range(2 * sites // 5, 2 * sites // 5 + sites // 4))
    found: dict[Mask, None] = {}
    while len(found) < OFFSPRING:
        back, gone = int(rng.choice(parent.dropped)), int(rng.choice(parent.kept))
        found[parent.with_([back]).without([gone])] = None
    return list(found)


def measure(
    shared: InProcess, plain: InProcess, masks: Sequence[Mask], flops: SiteCosts, repeats: int
) -> dict[str, Any]:
    """Ratios plain : shared of site-tokens, of FLOPs with the head, and of seconds, in turns."""
    runs = [(shared.run(0, masks), plain.run(0, masks))]
    seconds: list[tuple[float, float]] = []
    for _ in range(repeats):
        pair = []
        for backend in (shared, plain):
            start = time.perf_counter()
            backend.run(0, masks)
            pair.append(time.perf_counter() - start)
        seconds.append((pair[0], pair[1]))
    ours, theirs = runs[0]
    counted = theirs.cost_tokens / ours.cost_tokens
    clock = [b / a for a, b in seconds]
    weights = flops.sites
    body = sum(sum(w for w, kept in zip(weights, m.keep, strict=True) if kept) for m in masks)
    once = sum(n * w for n, w in zip(executed_sites(masks), weights, strict=True))
    return {
        "masks": len(masks),
        "losses_equal": ours.losses == theirs.losses,
        "ratio_sites": sum(sum(m.keep) for m in masks) / sum(executed_sites(masks)),
        "ratio_site_flops": body / once,
        "ratio_cost_tokens": counted,
        "ratio_clock": statistics.median(clock),
        "ratio_clock_min_max": [min(clock), max(clock)],
        "clock_share_of_saving": (1 - 1 / statistics.median(clock)) / (1 - 1 / counted),
        "shared_s": [a for a, _ in seconds],
        "plain_s": [b for _, b in seconds],
    }


if __name__ == "__main__":
    main()
