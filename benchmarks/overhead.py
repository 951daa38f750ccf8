"""What the Ray backend costs beside this process, with one worker of one thread each.

    python benchmarks/overhead.py [RUN.yaml] [--processes 8] [--rounds 4] [--batches 4] [--unit 0.5]
        [--out F]

On the model and the text of a run file, or on a small random llama, which is made for it. The same
masks on the same batches, as units of about `--unit` seconds, in turns through this
process and through a Ray worker on this machine; losses must be equal bit for bit. Once as a search
does it, which knows the next batches: round by round. And once with every unit asked for only when
the one before is done, so that nothing hides the way to the worker and back: unit by unit, together
with how long that way is, which is the time that the worker did not spend on computing. Two
processes that do the same work differ by several per cent for as long as they live, so a process
without Ray, which is handed the same units through a pipe, takes its turns beside them, and all of
this is done in new processes again and again; the figures are medians over them, those with `_95`
an interval of the median. Prints one JSON document; exits with 1 if losses differ.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depthsearch.config import load_config, resolved_yaml
from depthsearch.evaluation import Backend
from depthsearch.run.session import Session
from depthsearch.space import Mask
from random_workplace import write_workplace

BATCH_TOKENS = 256
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
WAYS = ("as_a_search_asks", "one_unit_at_a_time")
SHARE_KEPT = 0.75
MOST_MASKS = 512
PIPED: dict[str, Backend] = {}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--unit", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    # Ray's workers give way to all else on the machine; here both sides have equal rights to it.
    os.environ |= {"RAY_worker_niceness": "0"}
    parts = []
    for _ in range(chosen.processes):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            parts.append(process.submit(measure, chosen).result())
    result = together(parts, chosen.config is not None) | {"processes": parts}
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n", encoding="utf-8")
    if not result["losses_equal"]:
        sys.exit(1)


def together(parts: Sequence[dict[str, Any]], given: bool) -> dict[str, Any]:
    """What all processes have in common, and the medians of the rest over them."""
    first = parts[0]
    figures: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        figures[way] = {}
        for figure in first[way]:
            if figure == "turn_seconds":
                continue
            values = sorted(part[way][figure] for part in parts)
            figures[way][figure] = round(statistics.median(values), 2)
            if figure.endswith("overhead_percent") or figure == "beside_pipe_percent":
                figures[way][f"{figure}_95"] = median_interval(values)
    return {
        "benchmark": "overhead",
        "signature": first.pop("signature")
        | {
            "ray": version("ray"),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        },
        **({} if given else {"sizes": SIZES}),
        "losses_equal": all(part.pop("losses_equal") for part in parts),
        **figures,
    }


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """At least 95 % of the median of which these, in order, are a sample; None for under six.

    It lies between the k-th lowest and the k-th highest but for two binomial tails.
    """
    count = len(values)
    tail, inside = 0.0, -1
    while (tail := tail + math.comb(count, inside + 1) / 2**count) <= 0.025:
        inside += 1
    return None if inside < 0 else (values[inside], values[count - 1 - inside])


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Both backends on the same work, in turns, in this process and one worker."""
    with tempfile.TemporaryDirectory() as scratch:
        return measured(chosen, Path(scratch))


def measured(chosen: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """`measure`, its files in `scratch`."""
    settings = {
        "model": {"dtype": "float32", "device": "cpu"},
        "calibration": {
            "window_tokens": 64,
            "batch_tokens": BATCH_TOKENS,
            "select_tokens": BATCH_TOKENS * chosen.batches,
            "finals_tokens": 64,
            "heldout_tokens": 64,
        },
        "search": {"max_evaluations": 10},
        "cluster": {"backend": "ray", "workers": 1, "threads": 1},
    }
    path = write_config(scratch, chosen.config, settings)
    session = Session.open(load_config(path))
    stack = ExitStack()
    try:
        windows = session.splits(0).select
        one_process = replace(session, config=load_config(path, ["cluster.backend=in-process"]))
        here = one_process.backend(windows, 0)
        backends: dict[str, Any] = {
            "here": here,
            "pipe": Piped(stack.enter_context(piped(path))),
            "ray": session.backend(windows, 0),
        }
        masks = offspring(len(session.space.sites), MOST_MASKS)
        count = unit_masks(here, masks, chosen.unit)
        cluster = session.workers.cluster
        assert cluster is not None
        batches = range(chosen.batches)
        found = {
            WAYS[0]: compare(backends, masks[:count], [batches] * chosen.rounds),
            WAYS[1]: compare(
                backends,
                masks[:count],
                [[batch] for _ in range(chosen.rounds) for batch in batches],
                lambda: sum(worker["busy_s"] for worker in cluster.dispatcher.state()["workers"]),
            ),
        }
        signature = session.signature(session.splits(0), 0)
    finally:
        stack.close()
        session.close()
    return {
        "signature": signature,
        "masks_a_unit": count,
        "losses_equal": all(part.pop("equal") for part in found.values()),
        **found,
    }


def write_config(scratch: Path, given: Path | None, settings: dict[str, dict[str, Any]]) -> Path:
    """A run file with these settings: on the model of a given one, or on a random one."""
    if given is None:
        return write_workplace(scratch, SIZES, settings)
    overrides = [
        f"{section}.{key}={value}"
        for section in settings
        for key, value in settings[section].items()
    ]
    path = scratch / "run.yaml"
    path.write_text(resolved_yaml(load_config(given, overrides)), encoding="utf-8")
    return path


def unit_masks(here: Backend, masks: Sequence[Mask], unit: float) -> int:
    """How many masks take about `unit` seconds on one batch; at least one."""
    # The first time includes the dense pass that records the batch.
    timed(here, masks[:1], [0])
    count = 1
    while count < len(masks):
        took = min(timed(here, masks[:count], [0])[0] for _ in range(3))
        if took > unit / 2:
            return max(1, round(count * unit / took))
        count *= 2
    return count


class Piped:
    """A process without Ray that runs the same units."""

    def __init__(self, process: ProcessPoolExecutor) -> None:
        self._process = process

    def run(self, batch: int, masks: Sequence[Mask], following: Sequence[int]) -> Any:
        """What `Backend.run` gives; `following` is not made use of."""
        return self._process.submit(run_piped, batch, masks).result()


def piped(path: Path) -> ProcessPoolExecutor:
    """A process that has opened this configuration by the time of its first unit."""
    return ProcessPoolExecutor(1, get_context("spawn"), open_piped, (path,))


def open_piped(path: Path) -> None:
    """Load the model in the other process, with as many threads as everybody has."""
    torch.set_num_threads(1)
    session = Session.open(load_config(path, ["cluster.backend=in-process"]))
    PIPED["backend"] = session.backend(session.splits(0).select, 0)


def run_piped(batch: int, masks: Sequence[Mask]) -> Any:
    """One unit, in the other process."""
    return PIPED["backend"].run(batch, masks)


def compare(
    backends: dict[str, Any],
    masks: Sequence[Mask],
    turns: Sequence[Sequence[int]],
    busy_s: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """The batches of each turn through one backend, then through the other.

    `busy_s` tells how long workers have computed so far.
    """
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    ways: list[float] = []
    equal = True
    for backend in backends.values():
        timed(backend, masks, sorted({batch for turn in turns for batch in turn}))
    for number, turn in enumerate(turns):
        losses = {}
        first = number % len(backends)
        for name in [*list(backends)[first:], *list(backends)[:first]]:
            before = busy_s() if busy_s is not None else 0.0
            took, losses[name] = timed(backends[name], masks, turn)
            seconds[name].append(took)
            if name == "ray" and busy_s is not None:
                ways.append(took - (busy_s() - before))
        equal = equal and all(found == losses["here"] for found in losses.values())
    middles = {name: statistics.median(took) for name, took in seconds.items()}
    result: dict[str, Any] = {
        "equal": equal,
        "unit_seconds": round(middles["here"] / len(turns[0]), 3),
        "overhead_percent": round(100 * (middles["ray"] / middles["here"] - 1), 1),
        "pipe_overhead_percent": round(100 * (middles["pipe"] / middles["here"] - 1), 1),
        "beside_pipe_percent": round(100 * (middles["ray"] / middles["pipe"] - 1), 1),
        "turn_seconds": {name: [round(s, 2) for s in took] for name, took in seconds.items()},
    }
    if ways:
        way = statistics.median(ways)
        result["way_ms"] = round(1000 * way, 1)
        result["way_percent_of_a_unit"] = round(100 * way / result["unit_seconds"], 2)
    return result


def timed(backend: Any, masks: Sequence[Mask], batches: Sequence[int]) -> tuple[float, list[Any]]:
    """Seconds and losses of these masks on some batches, the later ones announced."""
    start = time.perf_counter()
    losses = [
        backend.run(batch, masks, batches[place + 1 :]).losses
        for place, batch in enumerate(batches)
    ]
    return time.perf_counter() - start, losses


def offspring(sites: int, count: int) -> list[Mask]:
    """Distinct masks, one swap away from one another."""
    rng = np.random.default_rng(0)
    dropped = rng.choice(sites, round((1 - SHARE_KEPT) * sites), replace=False)
    parent = Mask.dropping(sites, dropped.tolist())
    found: dict[Mask, None] = {}
    while len(found) < count:
        back, gone = (rng.choice(part) for part in (parent.dropped, parent.kept))
        parent = parent.with_([int(back)]).without([int(gone)])
        found[parent] = None
    return list(found)


if __name__ == "__main__":
    main()
