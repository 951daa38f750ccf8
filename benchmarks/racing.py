"""Races replayed on recorded losses: what each rule saves, and how often it loses a survivor.

    python benchmarks/racing.py CONFIG TABLE [--races 500] [--out FILE]

TABLE (.npz) holds the losses of real masks on every window, in the order of the text. It is read
where it exists, else made and written: CONFIG names model, space and text; masks are the baselines
and offspring of an evolution that judges all of them on all text, and random ones. Thousands of
races are then run over it by the code that searches use.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from depthsearch.config import load_config
from depthsearch.evaluation import Racing, UnitResult, evaluate
from depthsearch.run.session import Session
from depthsearch.searchers import build_searcher
from depthsearch.space import Evaluation, Hints, Mask, Status

MASKS, RANDOM = 112, 16
WINDOWS, WINDOW_TOKENS, BATCH_TOKENS = 64, 128, 512
ROWS = BATCH_TOKENS // WINDOW_TOKENS
BEST, KNOWN = 40, 40
SURVIVORS = (1, 4, 8)

Losses = np.ndarray[Any, np.dtype[np.float64]]
Rule = Callable[[Losses, Losses, int], list[int]]
"""From losses of candidates and of rivals `[mask, window]` and the places: windows judged of each
candidate."""


def make_table(config_path: Path, table: Path) -> None:
    """Judge masks of an evolution, and random ones, on all windows; write losses and signature."""
    config = load_config(
        config_path,
        [
            f"calibration.window_tokens={WINDOW_TOKENS}",
            f"calibration.select_tokens={BATCH_TOKENS}",
            f"calibration.finals_tokens={WINDOWS * WINDOW_TOKENS}",
            f"calibration.batch_tokens={BATCH_TOKENS}",
            "objective.positions=0.25",
        ],
    )
    session = Session.open(config)
    splits = session.splits(0)
    # Windows of the finals are in the order of the text; those that a search races on are not.
    backend = session.backend(splits.finals, 0)
    hints, _ = backend.hints()
    rng = np.random.default_rng(0)
    losses: dict[Mask, tuple[float, ...]] = {}
    origins: dict[Mask, str] = {}
    plans: dict[str, tuple[int, dict[str, object]]] = {
        "evolution": (MASKS, {"sweep": False}),
        "random": (MASKS + RANDOM, {"batch": RANDOM}),
    }
    for method, (enough, options) in plans.items():
        searcher = build_searcher(method, session.space, hints, rng, options)
        while len(losses) < enough:
            asked = [p for p in searcher.ask(None).proposals if p.mask not in losses]
            evaluations, _ = evaluate(backend, [p.mask for p in asked])
            searcher.tell(evaluations)
            for proposal, evaluation in zip(asked, evaluations, strict=True):
                if evaluation.status is Status.OK:
                    losses[proposal.mask] = evaluation.losses
                    origins[proposal.mask] = proposal.origin
            print(f"{len(losses)} masks judged", file=sys.stderr, flush=True)
    signature = session.signature(splits, 0) | {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    }
    np.savez(
        table,
        masks=np.array([mask.key for mask in losses]),
        origins=np.array([origins[mask] for mask in losses]),
        losses=np.array(list(losses.values())),
        signature=np.array(json.dumps(signature)),
    )


@dataclass(frozen=True)
class Setting:
    """Races of one kind: how many candidates, on how many windows, of which masks."""

    name: str
    candidates: int
    windows: int
    rivals: bool
    best: bool = False

    def draw(self, table: Losses, survivors: int, rng: np.random.Generator) -> tuple[Losses, ...]:
        """Candidates and rivals `[mask, window]`: the best of others, as an evolution has them."""
        ranked = np.argsort(table.mean(axis=1))
        pool = ranked[:BEST] if self.best else ranked
        places = rng.choice(pool, self.candidates + KNOWN * self.rivals, replace=False)
        drawn = table[np.ix_(places, rng.permutation(table.shape[1])[: self.windows])]
        candidates, known = drawn[: self.candidates], drawn[self.candidates :]
        return candidates, known[np.argsort(known.mean(axis=1))[:survivors]]


SETTINGS = (
    Setting("first ask: 32 masks, 64 windows", 32, 64, rivals=False),
    Setting("generation: 16 masks and rivals, 64 windows", 16, 64, rivals=True),
    Setting("generation: 16 masks and rivals, 16 windows", 16, 16, rivals=True),
    Setting("near: 16 of the 40 best, 64 windows", 16, 64, rivals=False, best=True),
)


@dataclass(frozen=True)
class Recorded:
    """A backend that reads losses `[mask, window]`."""

    losses: dict[Mask, Losses]
    sequences: tuple[int, ...]
    window_tokens: int = 1
    preparation: float = 0.0

    def run(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int] = (), *, sure: bool = True
    ) -> UnitResult:
        rows = slice(batch * ROWS, (batch + 1) * ROWS)
        return UnitResult(
            tuple(tuple(self.losses[mask][rows].tolist()) for mask in masks),
            (Status.OK,) * len(masks),
            0.0,
        )

    def plan(self, masks: Sequence[Mask]) -> float:
        return 0.0

    def prepare(self, masks: Sequence[Mask]) -> float:
        return 0.0

    def hints(self) -> tuple[Hints, float]:
        raise NotImplementedError


def raced(racing: Racing, candidates: Losses, rivals: Losses, survivors: int) -> list[int]:
    """As a search would race."""
    masks = [Mask.from_key(format(i, "08b")) for i in range(len(candidates) + len(rivals))]
    contenders, known = masks[: len(candidates)], masks[len(candidates) :]
    count = candidates.shape[1]
    backend = Recorded(dict(zip(contenders, candidates, strict=True)), (ROWS,) * (count // ROWS))
    found, _ = evaluate(
        backend,
        contenders,
        survivors=survivors if racing.method == "paired" else None,
        rivals=[
            Evaluation(mask, tuple(losses.tolist()), count)
            for mask, losses in zip(known, rivals, strict=True)
        ],
        stages=racing.stages(len(contenders), survivors, backend.sequences),
        error_rate=racing.error_rate,
    )
    return [len(evaluation.losses) for evaluation in found]


def three_errors(candidates: Losses, rivals: Losses, survivors: int) -> list[int]:
    """Out by more than three standard errors of the difference to the last place that matters."""
    count = candidates.shape[1]
    seen = [count] * len(candidates)
    for done in range(ROWS, count, ROWS):
        active = [i for i, n in enumerate(seen) if n == count]
        pool = np.concatenate([candidates[active, :done], rivals[:, :done]])
        if len(pool) <= survivors:
            break
        reference = pool[np.argsort(pool.mean(axis=1), kind="stable")[survivors - 1]]
        differences = pool[: len(active)] - reference
        errors = differences.std(axis=1, ddof=1) / np.sqrt(done)
        for i, out in zip(active, differences.mean(axis=1) > 3 * errors, strict=True):
            seen[i] = done if out else count
    return seen


RULES: dict[str, Rule] = {
    "three standard errors": three_errors,
    "paired, 0.01": partial(raced, Racing(error_rate=0.01)),
    "paired, 0.05": partial(raced, Racing(error_rate=0.05)),
    "paired, 0.2": partial(raced, Racing(error_rate=0.2)),
    "halving, eta 2": partial(raced, Racing("halving")),
    "halving, eta 4": partial(raced, Racing("halving", eta=4)),
}


def replay(table: Losses, setting: Setting, survivors: int, races: int) -> dict[str, Any]:
    """All rules on the same `races`: what they save, lose, and leave behind."""
    found: dict[str, list[tuple[float, bool, float]]] = {name: [] for name in RULES}
    rng = np.random.default_rng([survivors, SETTINGS.index(setting)])
    for _ in range(races):
        candidates, rivals = setting.draw(table, survivors, rng)
        whole = np.concatenate([candidates, rivals]).mean(axis=1)
        kept = [i for i in np.argsort(whole)[:survivors] if i < len(candidates)]
        for name, rule in RULES.items():
            seen = rule(candidates, rivals, survivors)
            complete = [n == setting.windows for n in seen] + [True] * len(rivals)
            saved = 1 - sum(seen) / candidates.size
            lost = any(not complete[i] for i in kept)
            found[name].append((saved, lost, float(whole[complete].min() - whole.min())))
    return {name: summary(rows) for name, rows in found.items()}


def summary(rows: Sequence[tuple[float, bool, float]]) -> dict[str, Any]:
    """Means over races; the rate of races that lost a survivor has its 95 % interval (Wilson)."""
    saved, lost, regret = np.array(rows, dtype=float).T
    count, rate, z = len(rows), float(lost.mean()), 1.96
    middle = (rate + z * z / 2 / count) / (1 + z * z / count)
    half = z * np.sqrt(rate * (1 - rate) / count + (z / 2 / count) ** 2) / (1 + z * z / count)
    return {
        "races": count,
        "saved": round(float(saved.mean()), 4),
        "lost": round(rate, 4),
        "lost_interval": [round(max(0.0, middle - half), 4), round(float(middle + half), 4)],
        "regret": round(float(regret.mean()), 5),
        "largest_regret": round(float(regret.max()), 4),
    }


def population(table: Losses) -> dict[str, Any]:
    """What the paired differences of the table are like; windows are in the order of the text."""
    first, second = np.triu_indices(len(table), 1)
    differences = table[first] - table[second]
    differences -= differences.mean(axis=1, keepdims=True)
    deviation = differences.std(axis=1)
    scaled = differences[deviation > 0] / deviation[deviation > 0, None]
    shifted = (scaled[:, 1:] * scaled[:, :-1]).mean(axis=1)
    parts = {
        "skewness": (scaled**3).mean(axis=1),
        "kurtosis": (scaled**4).mean(axis=1),
        "correlation of neighbours": shifted,
    }
    return {
        name: [round(float(x), 3) for x in np.percentile(values, [5, 50, 95])]
        for name, values in parts.items()
    }


def measure(table: Path, races: int) -> dict[str, Any]:
    """All settings."""
    with np.load(table) as stored:
        losses, signature = stored["losses"], json.loads(str(stored["signature"]))
        origins = [str(origin).split()[0] for origin in stored["origins"]]
    names = sorted(set(origins))
    results, start = [], time.monotonic()
    for setting in SETTINGS:
        for survivors in SURVIVORS:
            rules = replay(losses, setting, survivors, races)
            results.append({"setting": setting.name, "survivors": survivors, "rules": rules})
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return {
        "benchmark": "racing",
        "signature": signature,
        "masks": {name: origins.count(name) for name in names},
        "windows": losses.shape[1],
        "losses_5_50_95": [round(float(x), 3) for x in np.percentile(losses.mean(1), [5, 50, 95])],
        "differences_5_50_95": population(losses),
        "results": results,
    }


def main() -> None:
    """Make the table where it is missing, replay, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--races", type=int, default=500, help="races of each of twelve kinds")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if not chosen.table.exists():
        make_table(chosen.config, chosen.table)
    text = json.dumps(measure(chosen.table, chosen.races), indent=2)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
