"""Which cheap score tells what a mask will be worth in the end: rank correlations.

    python benchmarks/fidelity.py CONFIG RUN ... [--each 8] [--fit 16384] [--out FILE]

Masks come from the journals of finished runs with one budget: of each the `--each` best that were
judged on all search text, and as many drawn from the rest. Every mask is judged as the search could
judge it, on its own text: as cut, with repairs looked up, and with repairs fitted anew; and, on
held-out text, after the sequential repair that finalists get. CONFIG names model and text. Prints
one JSON document with Spearman's rho of each score to the last, and its 95 % interval over masks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from depthsearch.calibration.objectives import KLDivergence
from depthsearch.config import load_config
from depthsearch.evaluation import Backend, InProcess, Refitted
from depthsearch.journal import read_journal
from depthsearch.model.repair import patched
from depthsearch.run.directory import JOURNAL
from depthsearch.run.session import Session
from depthsearch.space import Evaluation, Mask, Status

DRAWS = 2000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--each", type=int, default=8, help="best masks of a run, and random ones")
    parser.add_argument("--fit", type=int, default=16384, help="tokens that repairs are fitted on")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    result = measure(chosen)
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n", encoding="utf-8")


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """All scores of all masks."""
    changes = [f"calibration.{kind}={chosen.fit}" for kind in ("fit_tokens", "finals_fit_tokens")]
    config = load_config(chosen.config, [*changes, "search.repair=gap", "search.finish=sequential"])
    session = Session.open(config)
    splits = session.splits(0)
    masks = {mask: run.name for run in chosen.runs for mask in sample(run, chosen.each)}
    plain = session.backend(splits.select, 0)
    scores: dict[str, Backend] = {
        "as cut": plain,
        "table": session.backend(splits.select, 0, "table", splits.fit),
        "gap": session.backend(splits.select, 0, "gap", splits.fit),
    }
    assert isinstance(plain, InProcess)
    heldout = InProcess(
        session.loaded.model,
        session.anatomy,
        splits.heldout,
        KLDivergence(),
        mode=session.check.mode,
        batch_tokens=config.calibration.batch_tokens,
        positions=config.objective.positions,
    )
    finish = Refitted(plain, splits.fit, "sequential")
    heldout.figures([session.space.dense])
    rows = []
    for mask, run in masks.items():
        row: dict[str, Any] = {"mask": mask.key, "run": run}
        row |= {name: score(backend, mask) for name, backend in scores.items()}
        row["as cut, held-out"] = float(heldout.figures([mask])[0].mean())
        with patched(session.loaded.model, session.anatomy, finish.repair(mask)):
            row["in the end"] = float(heldout.figures([mask])[0].mean())
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    end = [row["in the end"] for row in rows]
    return {
        "benchmark": "fidelity",
        "signature": session.signature(splits, 0)
        | {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"},
        "fit_tokens": chosen.fit,
        "spearman": {
            name: correlation([row[name] for row in rows], end)
            for name in (*scores, "as cut, held-out")
        },
        "masks": rows,
    }


def sample(run: Path, count: int) -> list[Mask]:
    """The best masks that a run judged on all of its text, and as many of the others."""
    records = read_journal(run / JOURNAL)
    final = {
        proposal["mask"]
        for record in records
        if record["op"] == "ask"
        for proposal in record["proposals"]
        if proposal["final"]
    }
    found = sorted(
        (
            evaluation
            for record in records
            if record["op"] == "tell"
            for evaluation in map(Evaluation.from_json, record["evaluations"])
            if evaluation.status is Status.OK and evaluation.mask.key in final
        ),
        key=lambda evaluation: evaluation.order,
    )
    rest = found[count:]
    drawn = np.random.default_rng(0).choice(len(rest), min(count, len(rest)), replace=False)
    return [e.mask for e in found[:count]] + [rest[int(place)].mask for place in drawn]


def score(backend: Backend, mask: Mask) -> float:
    """The loss on the search text."""
    units = [backend.run(batch, [mask]) for batch in range(len(backend.sequences))]
    return float(np.mean([loss for unit in units for loss in unit.losses[0]]))


def correlation(found: Sequence[float], end: Sequence[float]) -> dict[str, float]:
    """Spearman's rho, and its percentile interval over masks drawn with replacement."""
    rng = np.random.default_rng(0)
    pairs = np.array([found, end])
    draws = [spearman(pairs[:, rng.integers(0, len(end), len(end))]) for _ in range(DRAWS)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return {"rho": round(spearman(pairs), 3), "low": round(low, 3), "high": round(high, 3)}


def spearman(pairs: np.ndarray[Any, Any]) -> float:
    """The correlation of ranks; ties share theirs."""
    ranks = [
        np.array([(row < value).sum() + ((row == value).sum() - 1) / 2 for value in row])
        for row in pairs
    ]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
