"""Kill workers, drivers, nodes and Ray's servers at random moments; compare with a run in peace.

    python benchmarks/chaos.py [--runs 50] [--seed 0] [--out FILE]

A search over a small random model runs once undisturbed in one process, and once on Ray. Then it
runs again and again with one to three SIGKILLs each, in two set-ups:

- own: the run starts a cluster on this machine. Its workers, its raylet (the server of a node), its
  gcs (the server of a cluster) and the driver itself are killed.
- nodes: the run joins a cluster of a head and two more nodes, processes of their own on loopback.
  Workers, the driver and the raylets of the two nodes are killed; a node comes back after a while.

Whenever the driver is dead or has given up, the run is resumed, until it ends. Every journal (time
stamps aside) and every best.json must equal the undisturbed one. FILE is written after every run;
where it exists, only what it lacks is run. Only processes that this one started are killed: all
carry a mark in their environment. Exits with 1 on a difference or a process left behind.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from depthsearch.journal import read_journal
from forked_driver import PATIENCE_S, PRELOADED, Driver
from kills import journal_bytes, same
from loopback_nodes import Nodes
from random_workplace import write_workplace

MARK = "DEPTHSEARCH_CHAOS"
OWN = ("worker", "driver", "raylet", "gcs")
NODES = ("worker", "driver", "node")
WHILE_LOADING = 0.15
OWN_SHARE = 1 / 3
MOST_RESUMES = 10
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
SETTINGS = {
    "model": {"dtype": "float32", "device": "cpu"},
    "calibration": {
        "window_tokens": 32,
        "select_tokens": 1024,
        "finals_tokens": 1024,
        "heldout_tokens": 1024,
        "batch_tokens": 128,
    },
    "search": {"method": "evolution", "max_evaluations": 150, "finalists": 4},
    "cluster": {"backend": "ray", "threads": 1},
}


@dataclass
class Kill:
    """What was killed and when; `records` were in the journal, `exit` is what the driver left.

    `clear` is whether a driver that gave up said so in one line; None where it did not give up.
    `said` is the end of what it wrote where it was not clear.
    """

    what: str
    seconds: float
    records: int
    exit: int | None = None
    clear: bool | None = None
    said: str | None = None


@dataclass
class Run:
    """One search, killed and resumed to its end."""

    run: int
    setup: str
    kills: list[Kill] = field(default_factory=list)
    resumes: int = 0
    nodes_added: int = 0
    equal: bool = False
    seconds: int = 0
    problem: str | None = None


class Chaos:
    """Runs searches in `place` and kills what they are made of."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place = place
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.config = write_workplace(place, SIZES, SETTINGS)
        self.nodes: Nodes | None = None
        self.current: Driver | None = None
        self.reference = place / "undisturbed"
        self.finish("search", self.reference, "cluster.backend=in-process")
        began = time.monotonic()
        self.finish("search", place / "on-ray")
        self.ray_s = time.monotonic() - began
        self.searching_s = searching_seconds(place / "on-ray")
        if not same(place / "on-ray", self.reference):
            sys.exit("the undisturbed run on Ray differs from that of one process")

    def driver(self, out: Path, *overrides: str) -> Driver:
        """Start the search `out`, or resume it."""
        if out.exists():
            arguments = ["resume", str(out)]
        else:
            settings = [part for text in overrides for part in ("--set", text)]
            arguments = ["search", str(self.config), "--out", str(out), *settings]
        self.current = Driver(arguments, self.place / f"{out.name}.log")
        return self.current

    def close_nodes(self) -> None:
        """End the cluster of several nodes, if there is one."""
        if self.nodes is not None:
            self.nodes.close()
        self.nodes = None

    def close(self) -> None:
        """End what still runs."""
        if self.current is not None and self.current.exit is None:
            self.current.kill()
        self.close_nodes()

    def finish(self, what: str, out: Path, *overrides: str) -> None:
        """Run what must succeed."""
        driver = self.driver(out, *overrides)
        if driver.wait() != 0:
            sys.exit(f"{what} {out.name} failed: {driver.log.read_text(encoding='utf-8')[-500:]}")

    def run(self, number: int, setup: str) -> Run:
        """One search with one to three kills, resumed until it is whole, and compared."""
        run = Run(number, setup)
        self.rng = np.random.default_rng([self.seed, number])
        out = self.place / f"run{number}"
        began = time.monotonic()
        try:
            self.disturb(run, out)
            run.equal = same(out, self.reference)
        except TimeoutError as error:
            run.problem = str(error)
        run.seconds = round(time.monotonic() - began)
        return run

    def disturb(self, run: Run, out: Path) -> None:
        """Have one search done in spite of everything; raises TimeoutError where a driver hangs."""
        count = int(self.rng.integers(1, 4))
        kinds = self.rng.choice(OWN if run.setup == "own" else NODES, count)
        shares = sorted(self.rng.uniform(0, 1, count))
        driver = self.again(run, out)
        for what, share in zip(kinds, shares, strict=True):
            if driver.exit == 0:
                break
            if driver.exit is not None:
                driver = self.again(run, out)
            self.wait_for(driver, out, float(share))
            self.strike(run, driver, out, str(what))
            if what == "node" and self.nodes is not None:
                # The others go on meanwhile.
                driver_ended(driver, float(self.rng.uniform(1, 4)))
                run.nodes_added += self.nodes.restore()
        while driver.wait() != 0:
            self.note(run, driver)
            if self.nodes is not None:
                run.nodes_added += self.nodes.restore()
            driver = self.again(run, out)

    def again(self, run: Run, out: Path) -> Driver:
        """Resume, or start where no driver came far enough to make a directory."""
        run.resumes += out.exists()
        if run.resumes > MOST_RESUMES:
            raise TimeoutError(f"{run.resumes} resumes were not enough")
        joined = () if self.nodes is None else (f"cluster.address={self.nodes.address}",)
        return self.driver(out, *joined)

    def wait_for(self, driver: Driver, out: Path, share: float) -> None:
        """Wait for the moment: while loading, or when that share of the journal is written."""
        if self.rng.random() < WHILE_LOADING:
            driver_ended(driver, float(self.rng.uniform(0, self.ray_s - self.searching_s)))
            return
        size = share * journal_bytes(self.reference)
        until(lambda: driver.exit is not None or journal_bytes(out) >= size)
        steps = len(read(self.reference))
        driver_ended(driver, float(self.rng.uniform(0, 2 * self.searching_s / steps)))

    def strike(self, run: Run, driver: Driver, out: Path, what: str) -> None:
        """Kill it, if the driver still runs, and wait for drivers that can't go on without it."""
        victim = self.victim(driver, what)
        if victim is None or driver.exit is not None:
            return
        kill = Kill(what, round(time.monotonic() - driver.began, 1), len(read(out)))
        try:
            victim()
        except psutil.NoSuchProcess:
            return  # A worker of a driver killed before; it has just gone by itself.
        run.kills.append(kill)
        if what in ("driver", "raylet", "gcs"):
            driver.wait()
            self.note(run, driver)

    def victim(self, driver: Driver, what: str) -> Callable[[], None] | None:
        """How to kill it; waits until it is there, None where the driver ends before."""
        if what == "driver":
            return driver.kill
        if what == "node":
            assert self.nodes is not None
            choice = int(self.rng.integers(2))
            return lambda: self.nodes.kill(choice)  # type: ignore[union-attr]
        name = {"worker": "ray::Worker", "raylet": "raylet", "gcs": "gcs_server"}[what]
        found: list[psutil.Process] = []

        def look() -> bool:
            at = driver.below() if self.nodes is None else psutil.Process().children(recursive=True)
            for process in at:
                with suppress(psutil.NoSuchProcess):
                    if process.name().startswith(name):
                        found.append(process)
            return bool(found) or driver.exit is not None

        until(look)
        return found[int(self.rng.integers(len(found)))].kill if found else None

    def note(self, run: Run, driver: Driver) -> None:
        """Keep how a driver ended with the kill that ended it."""
        if run.kills and run.kills[-1].exit is None:
            run.kills[-1].exit = driver.exit
            if driver.exit is not None and driver.exit > 0:
                lines = driver.log.read_text(encoding="utf-8", errors="replace").splitlines()
                said = [line for line in lines if line.startswith("depthsearch: ")]
                run.kills[-1].clear = driver.exit == 2 and len(said) == 1 and lines[-1] == said[0]
                if not run.kills[-1].clear:
                    run.kills[-1].said = " / ".join(lines[-3:])[-400:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    mark = os.environ[MARK] = f"{os.getpid()}-{time.time():.0f}"
    # Ray reads these when it is imported: nothing listens beyond loopback, and no other cluster of
    # this machine is found or overwritten. Workers don't give way to what else runs, so that runs
    # stay short.
    scratch = tempfile.TemporaryDirectory(prefix="ds-")
    os.environ |= {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": scratch.name,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
    }
    (Path(scratch.name) / "ray").mkdir()
    multiprocessing.set_forkserver_preload(PRELOADED)
    runs = found_in(chosen.out)
    own = round(OWN_SHARE * chosen.runs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with scratch:
        chaos = Chaos(Path(scratch.name), chosen.seed)
        try:
            for setup, count in (("nodes", chosen.runs - own), ("own", own)):
                missing = count - sum(run.setup == setup for run in runs)
                if setup == "nodes" and missing > 0:
                    chaos.nodes = Nodes(Path(scratch.name) / "ray")
                for _ in range(missing):
                    runs.append(chaos.run(len(runs), setup))
                    print(json.dumps(asdict(runs[-1])), file=sys.stderr, flush=True)
                    report(chosen, chaos, runs, None)
                chaos.close_nodes()
        finally:
            chaos.close()
        left = strays(mark)
        result = report(chosen, chaos, runs, left)
    print(json.dumps(result, indent=2))
    if left or not result["identical"]:
        sys.exit(1)


def found_in(path: Path | None) -> list[Run]:
    """The runs that an interrupted benchmark left in its file."""
    if path is None or not path.exists():
        return []
    moments = json.loads(path.read_text(encoding="utf-8"))["moments"]
    return [Run(**{**run, "kills": [Kill(**kill) for kill in run["kills"]]}) for run in moments]


def report(
    chosen: argparse.Namespace, chaos: Chaos, runs: Sequence[Run], left: Sequence[str] | None
) -> dict[str, Any]:
    """The figures so far, written to the file that was asked for."""
    import ray

    kills = [kill for run in runs for kill in run.kills]
    whole = len(read(chaos.reference))
    best = json.loads((chaos.reference / "best.json").read_text(encoding="utf-8"))
    result = {
        "benchmark": "chaos",
        "signature": best["signature"]
        | {
            "ray": ray.__version__,
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        },
        "seed": chosen.seed,
        "runs": len(runs),
        "runs_asked_for": chosen.runs,
        "setups": Counter(run.setup for run in runs),
        "identical": all(run.equal for run in runs),
        "identical_runs": sum(run.equal for run in runs),
        "kills": len(kills),
        "kills_by_kind": Counter(kill.what for kill in kills),
        "kills_while_searching": sum(0 < kill.records < whole for kill in kills),
        "drivers_that_gave_up": sum(kill.clear is not None for kill in kills),
        "of_them_with_one_clear_line": sum(kill.clear is True for kill in kills),
        "resumes": sum(run.resumes for run in runs),
        "nodes_added_again": sum(run.nodes_added for run in runs),
        "processes_left": None if left is None else list(left),
        "undisturbed_on_ray_seconds": round(chaos.ray_s),
        "journal_records": whole,
        "moments": [asdict(run) for run in runs],
    }
    if chosen.out is not None:
        partial = chosen.out.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        partial.replace(chosen.out)
    return result


def read(run: Path) -> list[dict[str, Any]]:
    """The complete records of a run's journal, none where there is no journal yet."""
    path = run / "journal.jsonl"
    return read_journal(path) if path.exists() else []


def searching_seconds(run: Path) -> float:
    """From the first losses in a run's journal to its end."""
    found = read(run)
    first = next(record["time"] for record in found if record["op"] == "tell")
    return float(found[-1]["time"] - first)


def until(there: Callable[[], bool], patience_s: float = PATIENCE_S) -> bool:
    """Wait until something is so; False where it never was."""
    deadline = time.monotonic() + patience_s
    while not there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def driver_ended(driver: Driver, seconds: float) -> bool:
    """Let a driver work that long; True where it ended before."""
    return until(lambda: driver.exit is not None, seconds)


def strays(mark: str, patience_s: float = 30.0) -> list[str]:
    """Names of processes that carry the mark and are neither this one nor its helpers."""
    own = {os.getpid()}
    helpers = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")

    def found() -> list[str]:
        names = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if (
                    process.pid not in own
                    and process.environ().get(MARK) == mark
                    and process.status() != psutil.STATUS_ZOMBIE
                    and not any(helper in " ".join(process.cmdline()) for helper in helpers)
                ):
                    names.append(process.name())
        return names

    until(lambda: not found(), patience_s)
    return found()


if __name__ == "__main__":
    main()
