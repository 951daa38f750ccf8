"""Does each method find the optimum of a small space of a real model whose masks are all known?

    scripts/tabulate TABLE
    python benchmarks/optimum.py benchmarks/smollm2-16-sites.yaml TABLE [--evaluations 200]

TABLE is the run of the method `exhaustive`, which evaluates every mask on budget. Each method then
searches the same space, with several seeds and at most `--evaluations` masks, and is answered
from the table; masks that do not meet the budget (greedy's prefixes, single removals) are computed
with the model once and kept in memory. Races and stages cut text off as in a real search. For each
method: how many masks it evaluated until it had the optimum, and the rank of its best mask among
all on budget (1 is the optimum), by the loss on the search text, with that loss. Prints one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from depthsearch.config import load_config
from depthsearch.errors import DepthsearchError
from depthsearch.evaluation import Backend, Racing, UnitResult
from depthsearch.journal import Journal, read_journal
from depthsearch.run.ledger import Ledger
from depthsearch.run.loop import SearchLoop
from depthsearch.run.planning import Plan
from depthsearch.run.session import Session
from depthsearch.space import Evaluation, Hints, Mask, Sensitivity, Status

ARMS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "random": ("random", {}),
    "fixed": ("fixed", {}),
    "windows": ("windows", {}),
    "angular_window": ("angular_window", {}),
    "block_influence": ("block_influence", {}),
    "similarity": ("similarity", {}),
    "single_removal": ("single_removal", {}),
    "sensitivity": ("sensitivity", {}),
    "additive": ("additive", {}),
    "greedy": ("greedy", {}),
    "greedy, exchange": ("greedy", {"exchange": 8}),
    "beam, width 2": ("beam", {"width": 2}),
    "evopress": ("evopress", {"screen": 1 / 3, "generations": 100}),
    "evolution": ("evolution", {}),
    "surrogate": ("surrogate", {}),
    "mcts": ("mcts", {}),
    "optuna tpe": ("optuna", {"sampler": "tpe"}),
    "optuna cmaes": ("optuna", {"sampler": "cmaes"}),
    "optuna gp": ("optuna", {"sampler": "gp"}),
    "optuna qmc": ("optuna", {"sampler": "qmc"}),
    "optuna nsga2": ("optuna", {"sampler": "nsga2"}),
}


def main() -> None:
    """Search and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    session = Session.open(load_config(chosen.config))
    try:
        text = json.dumps(Bench(session, chosen).result(), indent=2)
    finally:
        session.close()
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n", encoding="utf-8")


class Bench:
    """The table, and the searches answered from it."""

    def __init__(self, session: Session, chosen: argparse.Namespace) -> None:
        self._session = session
        self._chosen = chosen
        splits = session.splits(session.config.search.seed)
        self._signature = session.signature(splits, session.config.search.seed)
        records = read_journal(chosen.table / "journal.jsonl")
        _check(self._signature, records[0]["signature"], chosen.table)
        told = [
            Evaluation.from_json(e) for r in records if r["op"] == "tell" for e in r["evaluations"]
        ]
        masks = session.space.enumerate(len(told))
        if masks is None or {e.mask for e in told} != set(masks):
            sys.exit(f"{chosen.table} does not hold every mask on budget: let its search end first")
        self._ranked = sorted(told, key=lambda evaluation: evaluation.order)
        self._rank = {e.mask: rank for rank, e in enumerate(self._ranked, 1)}
        self._answers = Answers(session.backend(splits.select, 0), told)

    def result(self) -> dict[str, Any]:
        """Everything."""
        losses = [e.loss for e in self._ranked if e.loss is not None]
        best = self._ranked[0]
        return {
            "benchmark": "optimum",
            "signature": self._signature | {"evaluations": self._chosen.evaluations},
            "masks_on_budget": len(self._ranked),
            "optimum": {
                "mask": best.mask.key,
                "dropped": [self._session.space.sites[i].name for i in best.mask.dropped],
                "loss": best.loss,
            },
            "losses": {
                "second": losses[1],
                "tenth": losses[9],
                "median": statistics.median(losses),
                "worst": losses[-1],
            },
            "methods": {name: self._method(name) for name in self._chosen.methods},
        }

    def _method(self, name: str) -> dict[str, Any]:
        rows = []
        for seed in self._chosen.seeds:
            row = self._searched(*ARMS[name], seed)
            print(json.dumps({"method": name, **row}), file=sys.stderr, flush=True)
            rows.append(row)
        ranks = [row["rank"] for row in rows if "rank" in row]
        return {
            "found_the_optimum": sum(rank == 1 for rank in ranks),
            "median_rank": statistics.median(ranks) if ranks else None,
            "seeds": rows,
        }

    def _searched(self, method: str, options: Mapping[str, object], seed: int) -> dict[str, Any]:
        plan = replace(
            self._session.plan(),
            method=method,
            options=options,
            seed=seed,
            max_evaluations=self._chosen.evaluations,
            racing=Racing(),
            ask=None,
        )
        try:
            return {"seed": seed, **self._course(plan)}
        except DepthsearchError as error:
            return {"seed": seed, "error": str(error)}

    def _course(self, plan: Plan) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "journal.jsonl"
            with Journal(path) as journal:
                loop = SearchLoop(
                    Ledger(journal), self._session.space, plan, self._answers, self._answers
                )
                loop.run({"version": "", "signature": {}, "config": {}, "space": {}})
            records = read_journal(path)
        seen = [
            evaluation["mask"]
            for record in records
            if record["op"] == "tell"
            for evaluation in record["evaluations"]
        ]
        ranks = [self._rank.get(Mask.from_key(key), len(self._rank) + 1) for key in seen]
        best = min(ranks)
        searched = [record["cost_tokens"] for record in records if record["op"] == "tell"]
        return {
            "rank": best,
            "loss": self._ranked[best - 1].loss,
            "evaluations": len(seen),
            "evaluations_until_best": ranks.index(best) + 1,
            "cost_tokens": round(searched[-1]),
        }


class Answers:
    """A `Backend` that looks masks up, and computes and keeps those that it does not know."""

    def __init__(self, backend: Backend, told: Sequence[Evaluation]) -> None:
        self._backend = backend
        self._known = {evaluation.mask: evaluation.losses for evaluation in told}
        self.sequences = backend.sequences
        self.window_tokens = backend.window_tokens
        self.preparation = backend.preparation

    def run(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int] = (), *, sure: bool = True
    ) -> UnitResult:
        """The losses of one batch, at the price of computing them."""
        new = [mask for mask in dict.fromkeys(masks) if mask not in self._known]
        if new:
            found = [self._backend.run(number, new).losses for number in range(len(self.sequences))]
            for place, mask in enumerate(new):
                self._known[mask] = tuple(loss for losses in found for loss in losses[place])
        start = sum(self.sequences[:batch])
        stop = start + self.sequences[batch]
        return UnitResult(
            tuple(self._known[mask][start:stop] for mask in masks),
            tuple(Status.OK for _ in masks),
            self.plan(masks) * self.sequences[batch] / sum(self.sequences),
        )

    def plan(self, masks: Sequence[Mask]) -> float:
        """What the model would take."""
        return self._backend.plan(masks)

    def prepare(self, masks: Sequence[Mask]) -> float:
        """What the model would take once."""
        return self._backend.prepare(masks)

    def hints(self) -> tuple[Hints, float]:
        """Those of the model."""
        return self._backend.hints()

    def sensitivity(self) -> tuple[Sensitivity, float]:
        """That of the model."""
        return self._backend.sensitivity()


def _check(here: Mapping[str, Any], there: Mapping[str, Any], table: Path) -> None:
    """The table must be of this model and this text."""
    for part in ("model", "data", "dtype", "protocol"):
        if here[part] != there[part]:
            sys.exit(f"{table} was made with another {part}: {there[part]}, not {here[part]}")


if __name__ == "__main__":
    main()
