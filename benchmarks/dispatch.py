"""The dispatcher alone: units a second through it, and how many workers a search can feed.

    python benchmarks/dispatch.py [--out FILE]

Workers are simulated and compute nothing, so the units a second are what the driver itself can
handle. For the second part a unit takes as long as the sublayers it really executes (shared
prefixes included) with a spread of 20 %, so splitting a set of masks costs what it costs. Prints
one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from depthsearch import __version__
from depthsearch.evaluation import executed_sites
from depthsearch.evaluation.crew import Answer, Limits, Unit
from depthsearch.evaluation.dispatch import Dispatcher
from depthsearch.evaluation.simulation import SimulatedCrew
from depthsearch.space import Mask, Status

SITES = 60
SPREAD = 0.2
TEXT = "text"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    rng = np.random.default_rng(0)
    searches = {
        "32 offspring, 16 batches": ([offspring(rng, 32) for _ in range(4)], 16),
        "32 offspring, 128 batches": ([offspring(rng, 32) for _ in range(4)], 128),
        "a greedy step of 60, 128 batches": ([removals()], 128),
        "256 offspring, 32 batches": ([offspring(rng, 256)], 32),
    }
    result: dict[str, Any] = {
        "benchmark": "dispatch",
        "signature": {
            "depthsearch": __version__,
            "python": platform.python_version(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "protocol": f"{SITES} sites, unit times by executed sublayers with a spread of "
            f"{100 * SPREAD:g} %, no race; efficiency is the work of one worker over the time of "
            "all",
            "seed": 0,
        },
        "driver_units_per_s": {"64 workers": driver_rate(64), "256 workers": driver_rate(256)},
        "efficiency": {
            name: {
                str(workers): round(efficiency(workers, asks, batches), 3)
                for workers in (1, 4, 16, 64, 256)
            }
            for name, (asks, batches) in searches.items()
        },
    }
    result["workers_fed"] = {
        name: max(int(workers) for workers, share in found.items() if share >= 0.8)
        for name, found in result["efficiency"].items()
    }
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n", encoding="utf-8")


def removals() -> list[Mask]:
    """Every single removal of the dense model."""
    return [Mask.dropping(SITES, [site]) for site in range(SITES)]


def offspring(rng: np.random.Generator, count: int) -> list[Mask]:
    """Distinct masks, one swap away from one that drops a random quarter of the sites."""
    parent = Mask.dropping(SITES, rng.choice(SITES, SITES // 4, replace=False).tolist())
    found: dict[Mask, None] = {}
    while len(found) < count:
        back, gone = (rng.choice(part) for part in (parent.dropped, parent.kept))
        found[parent.with_([int(back)]).without([int(gone)])] = None
        if rng.random() < 0.1:
            parent = list(found)[int(rng.integers(len(found)))]
    return list(found)


def null(text: str, batch: int, mask: Mask) -> Answer:
    """An evaluation that takes no time."""
    return Answer((0.0,), Status.OK)


def driver_rate(workers: int) -> float:
    """Units a second of real time, in a search whose units take no time to compute."""
    asked = offspring(np.random.default_rng(1), 512)
    crew = SimulatedCrew(workers, null)
    dispatcher = Dispatcher(crew, clock=crew.clock)
    dispatcher.start()
    start = time.perf_counter()
    for batch in range(20):
        dispatcher.compute(TEXT, batch, asked, sure=True)
    return round(crew.units / (time.perf_counter() - start))


def efficiency(workers: int, asks: Sequence[Sequence[Mask]], batches: int) -> float:
    """One worker's time for the whole search, over the summed time of `workers` of them."""

    def seconds(unit: Unit, rng: np.random.Generator) -> float:
        spread = max(0.05, 1 + SPREAD * float(rng.standard_normal()))
        return executed(unit.masks) * spread

    crew = SimulatedCrew(workers, null, seconds)
    dispatcher = Dispatcher(crew, Limits(unit_timeout_s=1e12), clock=crew.clock)
    dispatcher.start()
    for asked in asks:
        for batch in range(batches):
            later = range(batch + 1, batches)
            dispatcher.compute(TEXT, batch, asked, later, sure=True)
    alone = sum(batches * executed(tuple(asked)) for asked in asks)
    return alone / (workers * crew.now)


@lru_cache(maxsize=4096)
def executed(masks: tuple[Mask, ...]) -> int:
    """Sublayers executed for these masks on one batch, shared prefixes once."""
    return sum(executed_sites(masks))


if __name__ == "__main__":
    main()
