"""Run directories and comparisons as the rest of the package writes them, from a made-up loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from depthsearch.space import (
    Budget,
    CostTable,
    Evaluation,
    Mask,
    Proposal,
    SearchSpace,
    Site,
    SiteCosts,
    Status,
)

WriteRun = Callable[..., Path]


def make_space(
    blocks: int = 30, stacks: tuple[str, ...] = ("decoder",), **extra: Any
) -> SearchSpace:
    sites: list[Site] = []
    for stack in stacks:
        for block in range(blocks):
            sites.append(Site(len(sites), stack, block, "attention"))
            sites.append(Site(len(sites), stack, block, "ffn"))
    params = tuple(884_736 if s.kind == "attention" else 2_654_208 for s in sites)
    cache = tuple(384 if s.kind == "attention" else 0 for s in sites)
    costs = CostTable({"params": SiteCosts(28_312_128, params), "kv_bytes": SiteCosts(0, cache)})
    budget = extra.pop("budget", Budget("params", ratio=0.75, of="blocks"))
    return SearchSpace(tuple(sites), costs, budget, **extra)


class Judge:
    """A loss with the shape of real ones: ends are precious, runs are cheap, text adds noise."""

    def __init__(self, space: SearchSpace, sequences: int, seed: int) -> None:
        rng = np.random.default_rng(7)
        count = len(space.sites)
        place = np.linspace(-1, 1, count)
        kinds = np.array([0.4 if s.kind == "attention" else 1.0 for s in space.sites])
        self.weight = kinds * (0.05 + 0.06 * rng.random(count)) + 2.5 * np.abs(place) ** 8
        noise = np.random.default_rng(seed)
        self.text = noise.normal(1.0, 0.2, size=sequences)
        self.taste = 0.03 * noise.normal(size=(sequences, count))

    def losses(self, mask: Mask) -> tuple[float, ...]:
        gone = list(mask.dropped)
        base = float(self.weight[gone].sum()) * 0.6 + 0.012 * len(mask.runs) if gone else 0.0
        per_text = base * self.text + self.taste[:, gone].sum(axis=1)
        return tuple(np.maximum(per_text, 1e-4).tolist())


def write_run(
    folder: Path,
    space: SearchSpace | None = None,
    state: str = "finished",
    generations: int = 25,
    name: str = "SmolLM2-135M",
    family: str = "evolution",
    **losses: str,
) -> Path:
    """A run directory: `state` is finished, finals, searching, started or torn.

    `losses` are the kind of the objective and the score of the search, where they are not KL.
    """
    folder.mkdir(parents=True)
    space = space or make_space()
    rng = np.random.default_rng(0)
    judge, fresh = Judge(space, 32, 1), Judge(space, 64, 2)
    config = {
        "model": {"path": f"/models/{name}", "dtype": "bfloat16"},
        "objective": {"kind": losses.get("kind", "kl"), "positions": 0.25},
        "search": {"method": family, "seed": 0, "score": losses.get("score")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    records: list[dict[str, Any]] = [
        {
            "op": "start",
            "version": "0.1.0",
            "signature": {
                "version": "0.1.0",
                "model": {"source": name, "fingerprint": "sha256:4f1c"},
                "calibration": {"fingerprint": "sha256:99ab", "window_tokens": 256},
                "seed": 0,
            },
            "config": config,
            "space": space.to_json(),
        }
    ]
    state_now = {"cost": 0.0, "id": 0}

    def step(proposals: list[Proposal], survivors: int | None) -> list[Evaluation]:
        scores = {p.mask: sum(judge.losses(p.mask)[:8]) for p in proposals}
        cut = sorted(scores.values())[min(survivors or 10**9, len(scores)) - 1]
        told = []
        for number, proposal in enumerate(proposals):
            losses = judge.losses(proposal.mask)
            status = Status.OK if scores[proposal.mask] <= cut else Status.ELIMINATED
            if number == 5 and state_now["id"] == 3:
                status, losses = Status.NON_FINITE, ()
            losses = losses[:8] if status is Status.ELIMINATED else losses
            told.append(Evaluation(proposal.mask, losses, 256 * len(losses), status))
        state_now["cost"] += 0.7 * sum(e.tokens for e in told)
        ask = {
            "op": "ask",
            "id": state_now["id"],
            "survivors": survivors,
            "rivals": [],
            "proposals": [p.to_json() for p in proposals],
        }
        tell = {
            "op": "tell",
            "id": state_now["id"],
            "evaluations": [e.to_json() for e in told],
            "cost_tokens": state_now["cost"],
        }
        records.extend([ask, tell])
        state_now["id"] += 1
        return told

    if state != "started":
        windows = [
            Proposal(
                m, f"window {space.sites[m.dropped[0]].block}-{space.sites[m.dropped[-1]].block}"
            )
            for m in space.windows()
        ]
        keys = [float(judge.weight[list(gene)].mean()) for gene in space.genes]
        seen = {p.mask for p in windows}
        others = [
            Proposal(space.decode(keys), "block influence of sites"),
            Proposal(
                space.decode((np.array(keys) + 0.02 * rng.normal(size=len(keys))).tolist()),
                "block influence of blocks",
            ),
        ]
        told = step(windows + [p for p in others if p.mask not in seen], 8)
        sweep = [Proposal(m, "sweep", space.on_budget(m)) for m in space.removals(space.dense)]
        step(sweep, None)
        pool = [e for e in told if e.status is Status.OK]
        seen |= {e.mask for e in told}
        for _ in range(generations):
            parents = sorted(pool, key=lambda e: e.order)[:4]
            children = []
            for child in range(24):
                parent = parents[child % len(parents)].mask
                back = rng.choice(parent.dropped, size=min(2, len(parent.dropped)), replace=False)
                mask = space.repair(parent.with_(int(i) for i in back), rng)
                if mask not in seen:
                    seen.add(mask)
                    move = ("shift", "swap", "merge")[child % 3]
                    children.append(Proposal(mask, f"{family} {move}"))
            if children:
                pool += [e for e in step(children, 4) if e.status is Status.OK]
        ranked = sorted(pool, key=lambda e: e.order)
        baselines = [e.mask for e in ranked if e.mask in {p.mask for p in windows}][:3]
        finalists = list(dict.fromkeys([e.mask for e in ranked[:6]] + baselines))
        judged = sorted(
            (Evaluation(m, fresh.losses(m), 64 * 256) for m in finalists), key=lambda e: e.order
        )
        if state in ("finished", "finals"):
            state_now["cost"] += 0.7 * 64 * 256 * len(finalists)
            records.append(
                {
                    "op": "finals",
                    "evaluations": [e.to_json() for e in judged],
                    "baselines": [m.key for m in baselines],
                    "best": judged[0].mask.key,
                    "cost_tokens": state_now["cost"],
                }
            )
        if state == "finished":
            records.append(
                {
                    "op": "end",
                    "reason": "budget",
                    "best": judged[0].mask.key,
                    "cost_tokens": state_now["cost"],
                }
            )
            (folder / "best.json").write_text(json.dumps({"mask": judged[0].mask.key}))
    lines = [json.dumps(r | {"time": 1.7e9 + 4.2 * n}) + "\n" for n, r in enumerate(records)]
    if state == "torn":
        lines[-1] = lines[-1][: len(lines[-1]) // 2]
    (folder / "journal.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def make_comparison(export: bool = True) -> dict[str, Any]:
    """A compare.json of three arms and three seeds."""
    space = make_space()
    heldout = Judge(space, 40, 3)
    search, fresh = Judge(space, 32, 1), Judge(space, 64, 2)
    rng = np.random.default_rng(4)
    windows = sorted(space.windows(), key=lambda m: sum(search.losses(m)))
    keys = -search.weight
    arms = []
    for name, spread in (("greedy", 0.0), ("best window", 0.0), ("evolution", 0.02)):
        for seed in range(3):
            if name == "best window":
                mask = windows[0]
            else:
                noise = spread * rng.normal(size=len(keys))
                mask = space.decode((search.weight + noise).tolist())
                if name == "evolution":
                    mask = space.fill(windows[seed + 1], (search.weight + noise).tolist())
            losses = heldout.losses(mask)
            stderr = float(np.std(losses, ddof=1) / np.sqrt(len(losses)))
            final = float(np.mean(search.losses(mask)))
            arms.append(
                {
                    "name": name,
                    "method": name.split()[-1],
                    "seed": seed,
                    "cost_tokens": 2.0e6 + 1e5 * seed,
                    "evaluations": 812 + seed,
                    "seconds": 233.4,
                    "mask": mask.key,
                    "origin": f"{name} step",
                    "select_loss": final,
                    "finals_loss": float(np.mean(fresh.losses(mask))),
                    "heldout_kl": float(np.mean(losses)),
                    "heldout_kl_stderr": stderr,
                    "heldout_ce": 4.0 + float(np.mean(losses)),
                    "heldout_ce_stderr": stderr,
                    "anytime": [
                        [2e5, final * 2.2],
                        [5e5 + 2e5 * seed, final * 1.3],
                        [1.6e6, final],
                    ],
                    "heldout_losses": list(losses),
                }
            )
    summary = []
    for name in ("greedy", "best window", "evolution"):
        mean = float(np.mean([a["heldout_kl"] for a in arms if a["name"] == name]))
        summary.append(
            {
                "arm": name,
                "seeds": 3,
                "heldout_kl_mean": mean,
                "heldout_kl_low": mean - 0.08,
                "heldout_kl_high": mean + 0.09,
                "heldout_ce_mean": 4.0 + mean,
                "cost_tokens_mean": 2.1e6,
            }
        )
    return {
        "version": "0.1.0",
        "signature": {"model": {"source": "SmolLM2-135M"}, "seeds": [0, 1, 2]},
        "dense": {"heldout_kl": 0.0, "heldout_ce": 3.995, "perplexity": 54.3},
        "cost_tokens": 2.1e6,
        "arms": arms,
        "summary": summary,
        "pairs": [
            {
                "a": "evolution",
                "b": "greedy",
                "difference": -0.12,
                "low": -0.2,
                "high": -0.05,
                "verdict": "evolution is better",
            }
        ],
        "verdict": "Evolution is better than greedy at equal cost: the interval lies below zero.",
        "sites": [site.name for site in space.sites],
        "export": {
            "rows": [
                {
                    "name": "dense",
                    "parameters": 134_515_008,
                    "disk_bytes": 269_060_552,
                    "kv_bytes_per_token": 11_520,
                    "perplexity": 14.7,
                    "prefill_tokens_per_s": 1090.0,
                    "decode_tokens_per_s": 21.5,
                    "peak_memory_bytes": 812_000_000,
                },
                {
                    "name": "pruned",
                    "parameters": 109_742_400,
                    "disk_bytes": 219_500_000,
                    "kv_bytes_per_token": 8_832,
                    "perplexity": 35.6,
                    "prefill_tokens_per_s": 1391.0,
                    "decode_tokens_per_s": 27.2,
                    "peak_memory_bytes": None,
                },
            ]
        }
        if export
        else None,
    }


@pytest.fixture(name="write_run")
def write_run_fixture() -> WriteRun:
    return write_run


@pytest.fixture(name="comparison")
def comparison_fixture() -> dict[str, Any]:
    return make_comparison()


@pytest.fixture(name="space")
def space_fixture() -> SearchSpace:
    return make_space()
