"""Every method at equal cost at several budgets: where a search pays, and where a window does.

    python benchmarks/arena.py smollm2 --runs runs/arena [--budget keep_params=0.75]
                               [--seeds 0 1 2] [--set key=value] [--out FILE]

Runs `depthsearch compare` with benchmarks/arena.yaml at one budget after the other, each in a
folder of its own below `--runs`; what is there already is used or gone on with. Then sums up: for
each budget the arms by held-out KL with intervals, what stopping earlier would have given, the
verdict, and, of the arms that search, the share of EvoPress's cost at which their best mask so far
was as good as EvoPress's answer: of all that its search cost, and of what it had cost when it had
judged that answer, without the finals on both sides. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from depthsearch.journal import read_journal
from depthsearch.run.compare import read_compare
from depthsearch.run.directory import JOURNAL

ROOT = Path(__file__).resolve().parent.parent
MODELS: Mapping[str, tuple[str, Sequence[str]]] = {
    "smollm2": (
        ".data/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf",
        ("keep_params=0.875", "keep_params=0.75", "keep_params=0.625", "keep_kv_bytes=0.6"),
    ),
    "gemma3": (".data/gemma3-270m/gemma-3-270m-q4_k_m.gguf", ("keep_params=0.75",)),
    "qwen2": (".data/qwen2-500m/qwen2.5-coder-0.5b-instruct.gguf", ("keep_params=0.75",)),
}
REFERENCE = "evopress"
SUMMED = (
    "arm",
    "seeds",
    "heldout_kl_mean",
    "heldout_kl_low",
    "heldout_kl_high",
    "heldout_ce_mean",
    "select_loss_mean",
    "cost_tokens_mean",
    "evaluations_mean",
    "seconds_mean",
)
SINGLE = (
    "origin",
    "cost_tokens",
    "search_cost_tokens",
    "found_cost_tokens",
    "select_loss",
    "finals_loss",
    "heldout_kl",
    "heldout_ce",
)


def main() -> None:
    """Compare at each budget and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--budget", action="append", help="such as keep_params=0.75; several")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], help="as of depthsearch compare")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    path, budgets = MODELS[chosen.model]
    settings = [f"model.path={ROOT / path}", f"compare.seeds={chosen.seeds}", *chosen.set]
    found = {}
    for budget in chosen.budget or budgets:
        folder = chosen.runs / f"{chosen.model}-{budget}"
        found[budget] = compared(folder, path, chosen.seeds, budget, settings)
    first = next(iter(found.values()))
    result = {
        "benchmark": "arena",
        "signature": first["signature"],
        "dense": first["dense"],
        "budgets": {budget: summed_up(result) for budget, result in found.items()},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n", encoding="utf-8")


def compared(
    folder: Path, path: str, seeds: Sequence[int], budget: str, settings: Sequence[str]
) -> dict[str, Any]:
    """compare.json at one budget, of this model and these seeds."""
    if not (folder / "compare.json").exists():
        metric, _, share = budget.partition("=")
        program = Path(sys.executable).with_name("depthsearch")
        command = [str(program), "compare", str(ROOT / "benchmarks/arena.yaml")]
        command += ["--out", str(folder.absolute())]
        of = "model" if metric == "keep_latency" else "blocks"
        for setting in (*settings, f"space.budget={{{metric}: {share}, of: {of}}}"):
            command += ["--set", setting]
        code = subprocess.run(command, check=False, cwd=ROOT, stdout=sys.stderr).returncode
        if code:
            # The program has said why.
            raise SystemExit(code)
    found = read_compare(folder)
    asked, there = sorted(seeds), sorted(found["signature"]["seed"])
    model, known = Path(path).name, found["signature"]["model"]["source"]
    if (asked, model) != (there, known):
        raise SystemExit(
            f"{folder} holds a comparison of {known} with seeds {there}, not of {model} with "
            f"{asked}: choose another --runs"
        )
    for entry in found["arms"]:
        told = [r for r in read_journal(folder / entry["run"] / JOURNAL) if r["op"] == "tell"]
        entry["search_cost_tokens"] = told[-1]["cost_tokens"]
        entry["found_cost_tokens"] = found_after(told, entry["mask"])
    return found


def found_after(told: Sequence[Mapping[str, Any]], mask: str) -> float:
    """The cost_tokens of a run when it had judged a mask on all of its search text."""
    return next(
        float(record["cost_tokens"])
        for record in told
        if any(e["mask"] == mask and e["status"] == "ok" for e in record["evaluations"])
    )


def summed_up(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader wants of one budget."""
    gaps = {row["arm"]: row.get("gap_mean") for row in result["summary"]}
    return {
        "cost_tokens": result["cost_tokens"],
        "arms": [
            {key: row.get(key) for key in SUMMED} | {"gap": gaps[row["arm"]]}
            for row in sorted(result["summary"], key=lambda row: row["heldout_kl_mean"])
        ],
        "masks": {f"{e['name']}-seed{e['seed']}": e["mask"] for e in result["arms"]},
        "runs": {f"{e['name']}-seed{e['seed']}": single(e) for e in result["arms"]},
        "ranks": result["ranks"],
        "pairs": result["pairs"],
        "anytime": result["anytime"],
        "share_of_cost_to_match": matched(result, REFERENCE),
        "share_of_cost_until_found": matched(result, REFERENCE, own=True),
        "correlation": result["correlation"],
        "warnings": result["warnings"],
        "failed": result["failed"],
        "verdict": result["verdict"],
    }


def single(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One arm with one seed: what it ended with, and its lowest search loss against cost."""
    return {
        **{key: entry.get(key) for key in SINGLE},
        "course": [[round(cost), round(loss, 5)] for cost, loss in entry["anytime"]],
    }


def matched(
    result: Mapping[str, Any], reference: str, own: bool = False
) -> dict[str, list[float | None]]:
    """For each seed, the share of the reference's search cost after which an arm was as good.

    As good by held-out KL and by search loss, of the masks of its course that were measured and its
    answer; None where it never was. With `own` of the cost after which the reference had judged its
    answer, which is less where it went on without finding better.
    """
    shares: dict[str, list[float | None]] = {}
    last = {e["seed"]: e for e in result["arms"] if e["name"] == reference}
    for entry in result["arms"]:
        other = last.get(entry["seed"])
        if other is None or entry["name"] == reference:
            continue
        whole = other["found_cost_tokens" if own else "search_cost_tokens"]
        there = as_good(entry, other)
        share = None if there is None else there / whole
        shares.setdefault(entry["name"], []).append(share)
    return shares


def as_good(entry: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """The cost_tokens after which a run was as good as the answer of another, if it ever was."""
    answer = {**entry, "cost_tokens": entry["found_cost_tokens"]}
    there = (
        step["cost_tokens"]
        for step in (*entry["anytime_heldout"], answer)
        if step["heldout_kl"] <= other["heldout_kl"] and step["select_loss"] <= other["select_loss"]
    )
    return min(there, default=None)


if __name__ == "__main__":
    main()
