"""The surrogate search alone: how long it takes to propose a mask.

    python benchmarks/surrogate.py [--out FILE]

Losses come from a formula over 60 sites (single costs, gaps cheaper than their sites, pairs by
chance), so all time is the search's own: fitting the regression, making offspring, screening them.
Processor seconds of an ask over the masks it holds, in the five generations that come next once
100, 300 and 1,000 masks are known. Linear algebra runs in one thread. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from depthsearch import __version__
from depthsearch.searchers import build_searcher
from depthsearch.space import (
    Budget,
    CostTable,
    Evaluation,
    Hints,
    Mask,
    SearchSpace,
    Site,
    SiteCosts,
)

BLOCKS = 30
AT = (100, 300, 1000)
GENERATIONS = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "surrogate",
        "signature": {
            "depthsearch": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "protocol": f"{2 * BLOCKS} sites, 75 % of the blocks' parameters, free and packable "
            f"sublayer masks, default options; processor seconds a mask of {GENERATIONS} "
            "generations, one thread of linear algebra",
            "seed": 0,
        },
        "proposal_seconds_a_mask": {
            "free": proposal_seconds(packable=False),
            "packable": proposal_seconds(packable=True),
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n", encoding="utf-8")


def proposal_seconds(packable: bool) -> dict[str, dict[str, float]]:
    """By the number of known masks: the median of the generations that follow, and the longest."""
    space = sublayers(packable)
    loss = Formula(2 * BLOCKS)
    searcher = build_searcher("surrogate", space, hints(), np.random.default_rng(0), {})
    known = 0
    found: dict[int, list[float]] = {count: [] for count in AT}
    while any(len(times) < GENERATIONS for times in found.values()):
        start = time.process_time()
        batch = searcher.ask()
        spent = (time.process_time() - start) / len(batch.proposals)
        if any(p.origin.startswith("surrogate") for p in batch.proposals):
            for count, times in found.items():
                if known >= count and len(times) < GENERATIONS:
                    times.append(spent)
        searcher.tell([Evaluation(p.mask, (loss(p.mask),), 1) for p in batch.proposals])
        known += len(batch.proposals)
        print(f"{known} masks, {spent:.3f} s a mask", file=sys.stderr, flush=True)
    return {
        str(count): {"median": round(statistics.median(t), 4), "longest": round(max(t), 4)}
        for count, t in found.items()
    }


class Formula:
    """A made-up loss of masks over so many sites."""

    def __init__(self, sites: int) -> None:
        rng = np.random.default_rng(1)
        ends = 0.6 * np.abs(np.linspace(-1, 1, sites)) ** 6
        self._single = 0.05 * rng.lognormal(0.0, 0.5, sites) + ends
        self._pairs = np.triu(rng.normal(0.0, 0.01, (sites, sites)), 1)

    def __call__(self, mask: Mask) -> float:
        """The loss of a mask, positive."""
        gone = np.array([not kept for kept in mask.keep], dtype=float)
        gaps = sum(float(np.sqrt((self._single[a:b] ** 2).sum())) for a, b in mask.runs)
        return float(0.1 + np.logaddexp(0.0, 2 * (gaps + gone @ self._pairs @ gone)))


def sublayers(packable: bool) -> SearchSpace:
    """Attention and FFN of every block, with parameters in the ratio of SmolLM2's."""
    sites = tuple(
        Site(2 * block + place, "decoder", block, kind)
        for block in range(BLOCKS)
        for place, kind in enumerate(("attention", "ffn"))
    )
    costs = CostTable({"params": SiteCosts(10, (1, 3) * BLOCKS)})
    return SearchSpace(sites, costs, Budget("params", ratio=0.75, of="blocks"), packable=packable)


def hints() -> Hints:
    """Similarities that fall off with the distance between sites."""
    places = range(2 * BLOCKS + 1)
    rows = tuple(tuple(abs(a - b) / (4 * BLOCKS) for b in places) for a in places)
    return Hints(tuple(tuple(1 - x for x in row) for row in rows), rows)


if __name__ == "__main__":
    main()
