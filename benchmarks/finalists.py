"""How many finalists to rank again: does fresh text order the best masks of a search?

    python benchmarks/finalists.py RUN ... [--most 16] [--heldout 4096] [--out FILE]

Takes the `--most` best masks of finished runs by search loss, judges each on all of the run's
finals text and on held-out text, and prints one JSON document: for each run Spearman's rho of the
search loss and of the finals loss (on all of that text and on its first quarter) with the held-out
loss, and the held-out loss of the mask that 1, 2, 4 ... finalists would have led to, judged on the
whole text and thinned out by halves as a search does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from depthsearch.config import load_config
from depthsearch.journal import read_journal
from depthsearch.run.directory import CONFIG, JOURNAL
from depthsearch.run.session import Session
from depthsearch.space import Evaluation, Mask, Status
from fidelity import spearman

FEWEST = 4
"""So many at least are judged to the end of the finals text."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--most", type=int, default=16, help="masks of a run")
    parser.add_argument("--heldout", type=int, default=4096, help="tokens")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    result = {
        "benchmark": "finalists",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "runs": {run.name: measure(run, chosen.most, chosen.heldout) for run in chosen.runs},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n", encoding="utf-8")


def measure(run: Path, most: int, tokens: int) -> dict[str, Any]:
    """The best masks of one run by their three losses."""
    config = load_config(run / CONFIG)
    session = Session.open(config)
    seed = config.search.seed
    splits = session.splits(seed)
    best = [e for e in judged(run) if session.space.on_budget(e.mask)][:most]
    masks = [e.mask for e in best]
    heldout = splits.heldout[: tokens // config.calibration.window_tokens]
    found = session.judge(heldout).figures(masks)[0].mean(1).numpy()
    fresh = session.judge(splits.finals).figures(masks)[0].numpy()
    search = np.array([e.loss for e in best])
    quarter = fresh[:, : max(1, fresh.shape[1] // 4)].mean(1)
    counts = [2**i for i in range(len(masks).bit_length())]
    return {
        "signature": session.signature(splits, seed),
        "heldout_tokens": heldout.numel(),
        "rho": {
            "search loss": spearman(np.array([search, found])),
            "finals loss": spearman(np.array([fresh.mean(1), found])),
            "finals loss on a quarter": spearman(np.array([quarter, found])),
        },
        "heldout_kl_by_finalists": {
            str(count): {
                "all on the whole text": float(found[fresh[:count].mean(1).argmin()]),
                "thinned out": float(found[thinned(fresh[:count])]),
            }
            for count in counts
        },
        "masks": [
            {"mask": mask.key, "search": a, "finals": b, "heldout": c}
            for mask, a, b, c in zip(
                masks, search.tolist(), fresh.mean(1).tolist(), found.tolist(), strict=True
            )
        ],
    }


def judged(run: Path) -> list[Evaluation]:
    """What the run's search judged on all of its text, best first."""
    found: dict[Mask, Evaluation] = {}
    for record in read_journal(run / JOURNAL):
        if record["op"] == "tell":
            found |= {e.mask: e for e in map(Evaluation.from_json, record["evaluations"])}
    return sorted((e for e in found.values() if e.status is Status.OK), key=lambda e: e.order)


def thinned(losses: Any) -> int:
    """The place of the best of `[mask, sequence]`, halved after a quarter and half of the text."""
    places: Sequence[int] = range(len(losses))
    for part in (4, 2):
        seen = losses[:, : losses.shape[1] // part].mean(1)
        left = max(FEWEST, -(-len(losses) * part // 8))
        places = sorted(places, key=lambda place: float(seen[place]))[:left]
    return min(places, key=lambda place: float(losses[place].mean()))


if __name__ == "__main__":
    main()
