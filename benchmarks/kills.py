"""Kill a search again and again, resume it each time, and compare with one left in peace.

    python benchmarks/kills.py CONFIG [--kills 20] [--seed 0] [--set key=value ...] [--out FILE]

Runs the search once undisturbed. Then the same search is started, ended by SIGKILL at a random
moment, resumed, killed again and so on; a run that ends before its moment comes is compared, and
another one is started. After the last kill the run is resumed to its end. Every journal (time
stamps aside) and every best.json must equal the undisturbed one. Prints one JSON document; exits
with 1 on a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from depthsearch import __version__
from depthsearch.journal import read_journal, without_times

_KILLS_A_RUN = 5
_WHILE_LOADING = 0.1


@dataclass(frozen=True)
class Kill:
    """One process and the moment it was ended at; `records` were in the journal by then."""

    run: int
    command: str
    seconds: float
    records: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(chosen, Path(scratch))
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n", encoding="utf-8")
    if not result["identical"]:
        sys.exit(1)


def measure(chosen: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run, kill, resume and compare."""
    reference = scratch / "undisturbed"
    overrides = [part for text in chosen.overrides for part in ("--set", text)]
    search = ["search", str(chosen.config)]
    started = time.monotonic()
    finish(start([*search, "--out", str(reference), *overrides]))
    undisturbed_seconds = time.monotonic() - started
    ready_seconds = undisturbed_seconds - searching_seconds(reference)

    rng = np.random.default_rng(chosen.seed)
    kills: list[Kill] = []
    runs: list[Path] = [scratch / "0"]
    while len(kills) < chosen.kills:
        run = runs[-1]
        if (run / "best.json").exists():
            run = scratch / str(len(runs))
            runs.append(run)
        resuming = run.exists()
        command = ["resume", str(run)] if resuming else [*search, "--out", str(run), *overrides]
        # Most moments fall into the search, spread over its journal; some into loading.
        if rng.random() < _WHILE_LOADING:
            size, delay = 0.0, float(rng.uniform(0, ready_seconds))
        else:
            size = journal_bytes(run) + rng.uniform(0, 2 / _KILLS_A_RUN) * journal_bytes(reference)
            delay = float(rng.uniform(0, 2 * searching_seconds(reference) / records(reference)))
        began = time.monotonic()
        if killed(start(command), run, int(size), delay):
            seconds = round(time.monotonic() - began, 2)
            kills.append(Kill(len(runs) - 1, command[0], seconds, records(run)))
    if not runs[-1].exists():
        finish(start([*search, "--out", str(runs[-1]), *overrides]))
    elif not (runs[-1] / "best.json").exists():
        finish(start(["resume", str(runs[-1])]))
    equal = [same(run, reference) for run in runs]
    best = json.loads((reference / "best.json").read_text(encoding="utf-8"))
    return {
        "benchmark": "kills",
        "signature": best["signature"] | {"depthsearch": __version__},
        "seed": chosen.seed,
        "kills": len(kills),
        "kills_while_searching": sum(0 < kill.records < records(reference) for kill in kills),
        "runs": len(runs),
        "identical": all(equal),
        "undisturbed_seconds": round(undisturbed_seconds, 1),
        "journal_records": records(reference),
        "moments": [asdict(kill) for kill in kills],
    }


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """One depthsearch command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "depthsearch.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ.copy(),
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a command that must succeed."""
    _, problems = process.communicate()
    if process.returncode != 0:
        sys.exit(f"a command failed: {problems.decode(errors='replace').strip()}")


def killed(process: subprocess.Popen[bytes], run: Path, size: int, delay: float) -> bool:
    """Kill a command `delay` seconds after the journal holds `size` bytes; False if it ended."""
    while process.poll() is None and journal_bytes(run) < size:
        time.sleep(0.002)
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return process.returncode == -signal.SIGKILL
    finish(process)
    return False


def journal_bytes(run: Path) -> int:
    """The size of a run's journal, 0 where there is none yet."""
    path = run / "journal.jsonl"
    return path.stat().st_size if path.exists() else 0


def records(run: Path) -> int:
    """Complete records in the journal of a run, 0 where there is none yet."""
    path = run / "journal.jsonl"
    return len(read_journal(path)) if path.exists() else 0


def searching_seconds(run: Path) -> float:
    """From the first record of a run to its last."""
    found = read_journal(run / "journal.jsonl")
    return float(found[-1]["time"] - found[0]["time"])


def same(run: Path, reference: Path) -> bool:
    """Whether two finished runs agree byte for byte, time stamps aside."""
    journals = [without_times(read_journal(r / "journal.jsonl")) for r in (run, reference)]
    bests = [(r / "best.json").read_bytes() for r in (run, reference)]
    return journals[0] == journals[1] and bests[0] == bests[1]


if __name__ == "__main__":
    main()
