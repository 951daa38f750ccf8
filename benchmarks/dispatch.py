"""The dispatcher alone: units a second through it, and how many workers a search can feed.

    python benchmarks/dispatch.py [--out FILE]

Workers are simulated and compute nothing, so the units in a second of processor time are what the
driver itself can handle. For the second part a unit takes as long as what it really executes
(shared prefixes once, a head for every mask, the dense pass where a worker meets a batch) with a
spread of 20 %. `busy` is the share of their time that workers compute, `sharing` the work of one
worker over that of all, `total` their product: the speed-up over the number of workers. Prints one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from depthsearch import __version__
from depthsearch.evaluation.crew import Answer
from depthsearch.evaluation.dispatch import Dispatcher
from depthsearch.evaluation.feeding import (
    BUSY,
    TOTAL,
    Ask,
    Efficiency,
    best_total,
    efficiency,
    workers_fed,
)
from depthsearch.evaluation.simulation import SimulatedCrew
from depthsearch.space import Mask, Status

SITES = 60
SPREAD = 0.2
MOST = 256
TEXT = "text"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "dispatch",
        "signature": {
            "depthsearch": __version__,
            "python": platform.python_version(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "protocol": f"{SITES} sites, a quarter dropped; unit times by executed sublayers, one "
            "more for the head of every mask and a dense pass where a worker meets a batch, with a "
            f"spread of {100 * SPREAD:g} %; raced: of 32 masks 4 stay to the end, the others "
            "end after 4 batches and 6 more on average; fed: the largest number of 1, 2, 4 ... "
            f"{MOST} up to which busy is at least {BUSY}, or total at least {TOTAL}",
            "seed": 0,
        },
        "driver_units_per_s": {
            "64 workers, 512 masks, 20 batches": driver_rate(64, 512, 20),
            "256 workers, 512 masks, 20 batches": driver_rate(256, 512, 20),
            "256 workers, 32 masks, 512 batches": driver_rate(256, 32, 512),
        },
        "searches": {},
    }
    for name, (asks, batches) in searches(np.random.default_rng(0)).items():
        result["searches"][name] = figures(asks, batches)
        print(name, file=sys.stderr, flush=True)
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n", encoding="utf-8")


def searches(rng: np.random.Generator) -> dict[str, tuple[list[Ask], int]]:
    """What searchers ask for, one after the other, and on how many batches."""

    def evolution(asks: int, count: int) -> list[Ask]:
        return [Ask(tuple(offspring(rng, count))) for _ in range(asks)]

    return {
        "8 x 32 offspring, 16 batches": (evolution(8, 32), 16),
        "8 x 32 offspring, 128 batches": (evolution(8, 32), 128),
        "20 x 32 offspring, 128 batches": (evolution(20, 32), 128),
        "4 x 32 offspring, 512 batches": (evolution(4, 32), 512),
        "4 x 256 offspring, 32 batches": (evolution(4, 256), 32),
        "2 x 256 offspring, 128 batches": (evolution(2, 256), 128),
        "1 greedy step of 60, 128 batches": (greedy(rng, 1), 128),
        "8 greedy steps of 60 to 53, 128 batches": (greedy(rng, 8), 128),
        "8 x 32 offspring, 128 batches, raced": ([raced(rng) for _ in range(8)], 128),
    }


def figures(asks: list[Ask], batches: int) -> dict[str, Any]:
    """One search: what each number of workers reaches, and how many are fed."""
    fed = workers_fed(asks, batches, spread=SPREAD)
    still = efficiency(asks, batches, MOST, spread=0.0)
    found: dict[str, Any] = {str(reached.workers): shares(reached) for reached in fed.tried}
    found[f"{MOST} without spread"] = shares(still)
    if all(ask.lasts is None for ask in asks):
        found[f"{MOST} at best"] = {"total": round(best_total(asks, batches, MOST), 3)}
    return {"workers": found, "fed": {"busy": fed.busy, "total": fed.total}}


def shares(found: Efficiency) -> dict[str, float]:
    """Both shares and their product, rounded."""
    return {
        "busy": round(found.busy, 3),
        "sharing": round(found.sharing, 3),
        "total": round(found.total, 3),
    }


def greedy(rng: np.random.Generator, steps: int) -> list[Ask]:
    """Every single removal, then one of them taken at random, and so on."""
    mask, asks = Mask.dense(SITES), []
    for _ in range(steps):
        asks.append(Ask(tuple(mask.without([site]) for site in mask.kept)))
        mask = mask.without([int(rng.choice(mask.kept))])
    return asks


def raced(rng: np.random.Generator) -> Ask:
    """Offspring of which most lose early."""
    masks = offspring(rng, 32)
    lasts = [4 + int(found) for found in rng.geometric(0.15, len(masks) - 4)]
    return Ask(tuple(masks), (*lasts, *[sys.maxsize] * 4))


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


def driver_rate(workers: int, masks: int, batches: int) -> int:
    """Units a second of processor time, in a search whose units take no time to compute."""
    asked = offspring(np.random.default_rng(1), masks)
    crew = SimulatedCrew(workers, null)
    dispatcher = Dispatcher(crew, clock=crew.clock)
    dispatcher.start()
    start = time.process_time()
    for batch in range(batches):
        dispatcher.compute(TEXT, batch, asked, range(batch + 1, batches), sure=True)
    return round(crew.units / (time.process_time() - start))


if __name__ == "__main__":
    main()
