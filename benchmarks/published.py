"""EvoPress on as much text as published: what share of its cost does another search need?

    python benchmarks/published.py EVOPRESS RUN ... [--steps 6] [--tokens 8192] [--out FILE]

EVOPRESS and RUN ... are run directories of one model, text and budget, but for the size of their
search text. The answers of all and up to `--steps` masks of the course of each RUN are judged, on
every position, on the first `--tokens` of the search text of EVOPRESS, of which the others have
seen a part at most, and of the held-out text of all. Prints one JSON document: the losses, at which
share of EVOPRESS's cost each RUN was as good by both, and the difference of the answers on held-out
text with its interval. Of an EVOPRESS that is not finished the best mask so far is taken, and what
it has spent.
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
import torch

from depthsearch.config import load_config
from depthsearch.journal import read_journal
from depthsearch.run.anytime import improvements, spaced
from depthsearch.run.directory import BEST, CONFIG, JOURNAL
from depthsearch.run.session import Session
from depthsearch.run.statistics import paired_difference
from depthsearch.space import Mask

Step = tuple[float, str]
"""What had been spent, and the key of the mask that was best then."""


def main() -> None:
    """Judge and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evopress", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=6, help="masks of a course, spaced by cost")
    parser.add_argument("--tokens", type=int, help="of each text (default: all)")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    courses = [course(run, chosen.steps) for run in (chosen.evopress, *chosen.runs)]
    found = compared(chosen.evopress, chosen.runs, courses, chosen.tokens)
    text = json.dumps(found, indent=2)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n", encoding="utf-8")


def course(run: Path, steps: int) -> list[Step]:
    """The masks that a run had found on its way, and last what it answers, with their costs."""
    records = read_journal(run / JOURNAL)
    found = improvements(records)
    answer, best = found[-1].mask, run / BEST
    if best.exists():
        answer = json.loads(best.read_text(encoding="utf-8"))["mask"]
    spent = max(record["cost_tokens"] for record in records if "cost_tokens" in record)
    return [*((step.cost_tokens, step.mask) for step in spaced(found, steps)), (spent, answer)]


def compared(
    evopress: Path,
    runs: Sequence[Path],
    courses: Sequence[Sequence[Step]],
    tokens: int | None,
) -> dict[str, Any]:
    """The losses of all masks of the courses, and what they say."""
    config = load_config(evopress / CONFIG)
    session, seed = Session.open(config), config.search.seed
    splits = session.splits(seed)
    keys = list(dict.fromkeys(mask for found in courses for _, mask in found))
    count = None if tokens is None else tokens // splits.window_tokens
    texts = {"search text": splits.select[:count], "held-out": splits.heldout[:count]}
    losses = {name: judged(session, windows, keys) for name, windows in texts.items()}

    def rows(found: Sequence[Step]) -> list[dict[str, Any]]:
        return [
            {"cost_tokens": cost, "mask": mask}
            | {f"{name} KL": float(table[mask].mean()) for name, table in losses.items()}
            for cost, mask in found
        ]

    (reference, *others) = map(rows, courses)
    last = reference[-1]
    had = [next((r["cost_tokens"] for r in found if as_good(r, last)), None) for found in others]
    own = next(row["cost_tokens"] for row in reference if as_good(row, last))
    answers = np.array([losses["held-out"][found[-1][1]] for found in courses[1:]])
    theirs = losses["held-out"][courses[0][-1][1]]
    ahead = paired_difference(theirs[None], answers, np.random.default_rng(0))
    return {
        "benchmark": "published",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "signature": session.signature(splits, seed),
        "tokens": {name: windows.numel() for name, windows in texts.items()},
        "evopress": {
            "finished": (evopress / BEST).exists(),
            "search": config.search.model_dump(mode="json"),
            "course": reference,
        },
        "runs": [
            {
                "run": f"{run.parent.parent.name}/{run.name}",
                "select_tokens": load_config(run / CONFIG).calibration.select_tokens,
                "course": found,
                "share_of_cost_to_match": None if cost is None else cost / last["cost_tokens"],
                "share_of_cost_until_found": None if cost is None else cost / own,
            }
            for run, found, cost in zip(runs, others, had, strict=True)
        ],
        "evopress_minus_runs_heldout_kl": ahead.to_json(),
    }


def as_good(row: dict[str, Any], last: dict[str, Any]) -> bool:
    """Whether a mask is at most as bad as another by both losses."""
    return all(row[key] <= last[key] for key in row if key.endswith("KL"))


def judged(session: Session, windows: torch.Tensor, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """KL to the dense model of each mask, one for each window."""
    kl, _ = session.judge(windows).figures([Mask.from_key(key) for key in keys])
    return dict(zip(keys, kl.numpy(), strict=True))


if __name__ == "__main__":
    main()
