"""What closed-form repair is worth: masks as cut and repaired, against the size of the fit text.

    python benchmarks/repair.py CONFIG --mask NAME=KEY ... [--other TEXT] [--fit-text TEXT]
                                [--shares 0 0.5 1] [--toward-text 0 3] [--out FILE]

CONFIG is a run file; its model, text and windows are used. Every mask is judged as cut and repaired
in each of `--kinds` with each size of fit text, once for each of `--seeds`, which draw the text.
Losses are those on the fit text itself, on held-out text of the same source, and on held-out text
of `--other`; a repair that overfits shows as a gap between the first two. With `--fit-text` each of
`--shares` of the fit text is taken from there, such as from what the model wrote itself. With
`--toward-text` the targets lean by each of so many nats toward what predicts the fit text. Then,
unless `--no-price`, what evaluating offspring of the first mask costs, repaired and not. Prints one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

from depthsearch.calibration.objectives import KLDivergence
from depthsearch.calibration.text import load_documents
from depthsearch.calibration.windows import Other, make_splits
from depthsearch.config import load_config
from depthsearch.evaluation import InProcess, Refitted
from depthsearch.model.operators import OPERATORS
from depthsearch.model.repair import Patch, patched
from depthsearch.run.session import Session
from depthsearch.space import Mask

KINDS = ("gap", "sequential")
OFFSPRING = 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--mask", action="append", required=True, help="NAME=KEY")
    parser.add_argument("--other", help="text of another domain, under the same column")
    parser.add_argument("--fit-text", help="text for a share of the fit, under the column `text`")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0], help="of --fit-text")
    parser.add_argument("--fit", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--toward-text", type=float, nargs="+", default=[0.0], help="in nats")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help=f"{KINDS} or gap:OPERATOR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--heldout", type=int, default=16384)
    parser.add_argument("--price", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--set", action="append", default=[], help="key=value, as of a search")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    result = Bench(chosen).result()
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n", encoding="utf-8")


class Bench:
    """One session and what is measured in it."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen = chosen
        self._session = Session.open(load_config(chosen.config, chosen.set))
        self._masks = {
            name: Mask.from_key(key)
            for name, key in (entry.rsplit("=", 1) for entry in chosen.mask)
        }
        calibration = self._session.config.calibration
        documents = {"same": self._session.documents}
        if chosen.other is not None:
            documents["other"] = load_documents(chosen.other, calibration.column)
        given = chosen.fit_text
        self._fit_text = None if given is None else load_documents(given)
        # Held-out text never depends on the seed.
        self._texts = {
            name: self._judge(self._split(found, 0, 0)) for name, found in documents.items()
        }
        self._dense = {
            name: judge.figures([self._session.space.dense]) for name, judge in self._texts.items()
        }

    def result(self) -> dict[str, Any]:
        """Everything."""
        session, calibration = self._session, self._session.config.calibration
        splits = session.splits(0)
        return {
            "benchmark": "repair",
            "signature": session.signature(splits, 0)
            | {
                "protocol": (
                    f"held-out {self._chosen.heldout} tokens, windows of "
                    f"{calibration.window_tokens}, every position"
                ),
                **self._fit_signature(),
                "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            },
            "masks": {name: mask.key for name, mask in self._masks.items()},
            "dense": {name: float(ce.mean()) for name, (_, ce) in self._dense.items()},
            "figures": list(self._figures()),
            **({"price": self._price()} if self._chosen.price else {}),
        }

    def _fit_signature(self) -> dict[str, str]:
        found = self._fit_text
        return (
            {} if found is None else {"fit_text": f"{Path(found.source).name} {found.fingerprint}"}
        )

    def _figures(self) -> Iterator[dict[str, Any]]:
        for name, mask in self._masks.items():
            yield {"mask": name, "kind": "as cut", **self._losses(mask, ())}
        largest = max(self._chosen.fit)
        for seed, share in product(self._chosen.seeds, self._chosen.shares):
            windows = self._split(self._session.documents, seed, largest, heldout=0, share=share)
            for tokens in self._chosen.fit:
                fit = windows[: tokens // windows.shape[1]]
                on_fit = self._judge(fit[: self._chosen.heldout // 4 // windows.shape[1]])
                on_fit.figures([self._session.space.dense])
                for kind, nats in product(self._chosen.kinds, self._chosen.toward_text):
                    # One at a time: each holds the dense stream of its text.
                    repairer = self._repairer(kind, fit, nats)
                    for name, mask in self._masks.items():
                        row = self._repaired(mask, repairer, on_fit)
                        how = {"seed": seed, "share": share, "fit": tokens, "toward_text": nats}
                        row = {"mask": name, "kind": kind, **how, **row}
                        print(json.dumps(row), file=sys.stderr, flush=True)
                        yield row

    def _repairer(self, kind: str, fit: Tensor, nats: float) -> Refitted:
        repair, _, operator = kind.partition(":")
        assert repair in KINDS
        assert operator in ("", *OPERATORS)
        how = {"operator": operator or "refit", "toward_text": nats}
        return Refitted(self._texts["same"], fit, repair, **how)

    def _repaired(self, mask: Mask, repairer: Refitted, on_fit: InProcess) -> dict[str, Any]:
        start = time.perf_counter()
        patches = repairer.repair(mask)
        seconds = time.perf_counter() - start
        with patched(self._session.loaded.model, self._session.anatomy, patches):
            on_fit_kl = float(on_fit.figures([mask])[0].mean())
        return {
            "fit_kl": on_fit_kl,
            **self._losses(mask, patches),
            "seconds": round(seconds, 2),
            "ridges": sorted(patch.ridge for patch in patches),
        }

    def _losses(self, mask: Mask, patches: Sequence[Patch]) -> dict[str, float]:
        found = {}
        with patched(self._session.loaded.model, self._session.anatomy, patches):
            for name, judge in self._texts.items():
                kl, ce = judge.figures([mask])
                excess = ce - self._dense[name][1]
                found |= {f"{name}_kl": float(kl.mean()), f"{name}_excess": float(excess.mean())}
        return found

    def _price(self) -> dict[str, Any]:
        """Offspring of the first mask, plain and repaired, caches warm, in turns."""
        session, calibration = self._session, self._session.config.calibration
        select = self._split(session.documents, 0, calibration.select_tokens, heldout=0)
        fit = self._split(session.documents, 1, calibration.fit_tokens, heldout=0)
        plain, tabled = self._judge(select, 0.25), self._judge(select, 0.25, fit)
        backends = {"plain": plain, "table": tabled, "gap": Refitted(plain, fit, "gap")}
        masks = offspring(next(iter(self._masks.values())), OFFSPRING)
        seconds: dict[str, list[float]] = {name: [] for name in backends}
        cost = {}
        for name, backend in backends.items():
            tabled.prepare(masks)
            cost[name] = backend.plan(masks)
            run_all(backend, masks)
        for _ in range(2):
            for name, backend in backends.items():
                start = time.perf_counter()
                run_all(backend, masks)
                seconds[name].append(time.perf_counter() - start)
        middles = {name: statistics.median(took) for name, took in seconds.items()}
        return {
            "masks": OFFSPRING,
            "select_tokens": calibration.select_tokens,
            "fit_tokens": calibration.fit_tokens,
            "cost_tokens": {name: round(found) for name, found in cost.items()},
            "times_plain_cost": {n: round(c / cost["plain"], 2) for n, c in cost.items()},
            "times_plain_seconds": {
                name: round(took / middles["plain"], 2) for name, took in middles.items()
            },
            "seconds": {name: [round(s, 2) for s in took] for name, took in seconds.items()},
        }

    def _judge(
        self, windows: Tensor, positions: float = 1.0, fit: Tensor | None = None
    ) -> InProcess:
        session = self._session
        return InProcess(
            session.loaded.model,
            session.anatomy,
            windows,
            KLDivergence(),
            mode=session.check.mode,
            batch_tokens=session.config.calibration.batch_tokens,
            positions=positions,
            fit=fit,
        )

    def _split(
        self,
        documents: Any,
        seed: int,
        fit: int,
        heldout: int | None = None,
        share: float = 0.0,
    ) -> Tensor:
        """The held-out windows, or, with `heldout` 0, `fit` tokens for repairs."""
        calibration = self._session.config.calibration
        tokens = self._chosen.heldout if heldout is None else heldout
        splits = make_splits(
            documents,
            self._session.loaded.tokenizer,
            calibration.window_tokens,
            0,
            0,
            tokens,
            calibration.heldout_fraction,
            seed,
            fit,
            Other(self._fit_text, share) if self._fit_text is not None and share else None,
        )
        return splits.fit if heldout == 0 else splits.heldout


def run_all(backend: InProcess | Refitted, masks: Sequence[Mask]) -> None:
    """Every unit once."""
    for batch in range(len(backend.sequences)):
        backend.run(batch, masks)


def offspring(parent: Mask, count: int) -> list[Mask]:
    """Distinct masks one swap within a kind away from `parent`."""
    rng = np.random.default_rng(0)
    found: dict[Mask, None] = {}
    while len(found) < count:
        back = int(rng.choice(parent.dropped))
        like = [site for site in parent.kept if (site - back) % 2 == 0]
        found[parent.with_([back]).without([int(rng.choice(like))])] = None
    return list(found)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
