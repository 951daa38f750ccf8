"""Compare search methods: arms at equal cost, several seeds, figures on held-out data.

Each arm and seed is an ordinary run directory, so a comparison is resumable and each of its runs
can be reported, resumed or exported on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from depthsearch import __version__
from depthsearch.config import CompareConfig, RunConfig, SearchConfig, load_config, resolved_yaml
from depthsearch.errors import ConfigError, NothingFoundError, RunDirectoryError
from depthsearch.journal import read_journal
from depthsearch.model.patches import load_patches
from depthsearch.model.repair import patched
from depthsearch.run.directory import (
    ARMS,
    BEST,
    COMPARE,
    CONFIG,
    JOURNAL,
    REPAIR,
    create_directory,
    read_json,
    write_json,
)
from depthsearch.run.loop import OnProgress
from depthsearch.run.search import Finish, resume, search
from depthsearch.run.session import Session, check_search, opened
from depthsearch.run.statistics import bootstrap_interval, paired_difference
from depthsearch.run.verdict import verdict
from depthsearch.run.workers import check_gradients, check_repair
from depthsearch.space import Mask

OnHeldout = Callable[[int, int], None]
OnArm = Callable[[str, int, int, int], OnProgress | None]


def compare(
    config: RunConfig,
    out: Path,
    *,
    session: Session | None = None,
    on_arm: OnArm | None = None,
    on_heldout: OnHeldout | None = None,
    finish: Finish | None = None,
) -> dict[str, Any]:
    """Run every arm with every seed below `out`, measure all on held-out text, and sum up.

    An `out` that holds the same comparison, unfinished, is continued. `on_arm(arm, seed, runs
    done, runs)` is called before each run and may return its progress callback, `on_heldout(batches
    done, batches)` while held-out text is scored. Returns what
    compare.json holds. Raises ConfigError without arms, RunDirectoryError where `out` holds
    something else.
    """
    if config.compare is None:
        raise ConfigError(
            "the configuration has no 'compare' part: name at least one arm under compare.arms, "
            "such as {greedy: {method: greedy}, evolution: {method: evolution}}"
        )
    for settings in config.compare.arms.values():
        check_search(settings)
        check_repair(config, settings)
        check_gradients(config, settings)
    _check_out(config, out)
    with opened(config, session) as session:
        return _compare(config, out, session, on_arm, on_heldout, finish)


def _compare(
    config: RunConfig,
    out: Path,
    session: Session,
    on_arm: OnArm | None,
    on_heldout: OnHeldout | None,
    finish: Finish | None,
) -> dict[str, Any]:
    assert config.compare is not None
    splits = [session.splits(seed) for seed in config.compare.seeds]
    if len(splits[0].heldout) < 2:
        raise ConfigError(
            "a comparison needs at least 2 held-out windows for its intervals: raise "
            "calibration.heldout_tokens"
        )
    if not out.exists():
        create_directory(out, {CONFIG: resolved_yaml(config)})
    costs: dict[int, float] = {}
    order = _order(config.compare)
    seeds = config.compare.seeds
    runs = [(arm, seed) for seed in seeds for arm in order]
    entries: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for done, (arm, seed) in enumerate(runs):
        chosen = _arm_search(config, arm, seed, costs.get(seed))
        run = out / ARMS / f"{arm}-seed{seed}"
        on_progress = on_arm(arm, seed, done, len(runs)) if on_arm is not None else None
        try:
            _run_arm(replace(session, config=_single(config, chosen)), run, on_progress, finish)
        except (ConfigError, NothingFoundError) as error:
            if arm == config.compare.cost_tokens:
                raise NothingFoundError(
                    f"the arm '{arm}', whose cost the others get, failed with seed {seed}: {error}"
                ) from error
            failed.append({"name": arm, "seed": seed, "error": str(error)})
            continue
        entry = _entry(arm, chosen, _single(config, chosen).score, run)
        entries.append(entry)
        if arm == config.compare.cost_tokens:
            costs[seed] = entry["cost_tokens"]
    complete = {a for a in order if sum(e["name"] == a for e in entries) == len(seeds)}
    if not complete:
        raise NothingFoundError(f"no arm finished with every seed; the first: {failed[0]['error']}")
    entries = [entry for entry in entries if entry["name"] in complete]
    result = _summary(session, config, out, entries, on_heldout) | {"failed": failed}
    write_json(out / COMPARE, result)
    return result


def read_compare(out: Path) -> dict[str, Any]:
    """compare.json, with the exports made from its arms; raises RunDirectoryError."""
    data = read_json(out / COMPARE, "it is no finished comparison")
    exports = sorted(
        (out / ARMS).glob("*/export.json"), key=lambda path: (path.stat().st_mtime, path)
    )
    if exports:
        # One table: that of the arm exported last.
        data["export"] = read_json(exports[-1], "no export")
    return data


def _check_out(config: RunConfig, out: Path) -> None:
    """Refuse an `out` that is neither new nor this very comparison, unfinished."""
    if not out.exists():
        return
    if (out / COMPARE).exists():
        raise RunDirectoryError(
            f"{out} holds a finished comparison and is never overwritten: choose another --out"
        )
    if not (out / CONFIG).is_file() or (out / JOURNAL).exists():
        raise RunDirectoryError(f"{out} exists and is not a comparison: choose another --out")
    if load_config(out / CONFIG) != config:
        raise RunDirectoryError(
            f"{out} holds an unfinished comparison with another configuration: continue it with "
            f"`depthsearch compare {out / CONFIG} --out {out}`, or choose another --out"
        )


def _order(config: CompareConfig) -> list[str]:
    """The arms, the one whose cost the others get first."""
    first = [arm for arm in config.arms if arm == config.cost_tokens]
    return first + [arm for arm in config.arms if arm not in first]


def _arm_search(config: RunConfig, arm: str, seed: int, equal: float | None) -> SearchConfig:
    assert config.compare is not None
    limit = config.compare.cost_tokens
    if limit is None:
        cost = config.search.cost_tokens
    elif isinstance(limit, str):
        cost = None if arm == limit else equal
    else:
        cost = limit
    chosen = config.compare.arms[arm].model_copy(update={"seed": seed, "cost_tokens": cost})
    if chosen.options.get("storage") is None:
        return chosen
    # Every run keeps a study of its own in a storage that they share.
    name = f"{chosen.options.get('study_name', 'depthsearch')}-{arm}-seed{seed}"
    return chosen.model_copy(update={"options": chosen.options | {"study_name": name}})


def _single(config: RunConfig, chosen: SearchConfig) -> RunConfig:
    return config.model_copy(update={"search": chosen, "compare": None})


def _run_arm(
    session: Session, run: Path, on_progress: OnProgress | None, finish: Finish | None
) -> None:
    if (run / BEST).exists():
        return
    if run.exists():
        resume(run, session=session, on_progress=on_progress, finish=finish)
    else:
        search(session.config, run, session=session, on_progress=on_progress, finish=finish)


def _entry(arm: str, chosen: SearchConfig, score: str, run: Path) -> dict[str, Any]:
    best = read_json(run / BEST, "the run has not finished")
    records = read_journal(run / JOURNAL)
    curve: list[list[float]] = []
    lowest = float("inf")
    final: dict[int, list[bool]] = {}
    for record in records:
        if record["op"] == "ask":
            final[record["id"]] = [proposal["final"] for proposal in record["proposals"]]
        elif record["op"] == "tell":
            flags = final[record["id"]]
            losses = [
                evaluation["loss"]
                for evaluation, flag in zip(record["evaluations"], flags, strict=True)
                if flag and evaluation["status"] == "ok"
            ]
            if losses and min(losses) < lowest:
                lowest = min(losses)
                curve.append([record["cost_tokens"], lowest])
    return {
        "name": arm,
        "method": chosen.method,
        "seed": chosen.seed,
        "score": score,
        "run": f"{ARMS}/{run.name}",
        "mask": best["mask"],
        "origin": best["origin"],
        "cost": best["cost"],
        "cost_tokens": best["cost_tokens"],
        "evaluations": best["evaluations"],
        "seconds": round(_busy_seconds(records), 1),
        "select_loss": best["loss"],
        "finals_loss": best["finals_loss"],
        "repair": best.get("repair"),
        "anytime": curve,
    }


def _busy_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """Time between neighbouring records; a pause before a resume counts as one long step."""
    return float(records[-1]["time"] - records[0]["time"])


def _summary(
    session: Session,
    config: RunConfig,
    out: Path,
    entries: list[dict[str, Any]],
    on_heldout: OnHeldout | None,
) -> dict[str, Any]:
    assert config.compare is not None
    seeds = config.compare.seeds
    splits = session.splits(seeds[0])
    masks = list(dict.fromkeys([session.space.dense.key, *(e["mask"] for e in entries)]))
    kl_of, ce_of = _heldout(session, splits.heldout, out, masks, entries, on_heldout)
    for entry in entries:
        kl, ce = (found.get(entry["run"], found[entry["mask"]]) for found in (kl_of, ce_of))
        entry |= {
            "heldout_kl": _mean(kl),
            "heldout_kl_stderr": _stderr(kl),
            "heldout_ce": _mean(ce),
            "heldout_ce_stderr": _stderr(ce),
            "heldout_losses": kl,
            "cut_kl": _mean(kl_of[entry["mask"]]),
            "cut_ce": _mean(ce_of[entry["mask"]]),
        }
    rng = np.random.default_rng(0)
    by_arm = {
        arm: found
        for arm in config.compare.arms
        if (found := [entry for entry in entries if entry["name"] == arm])
    }
    tables = {arm: np.array([e["heldout_losses"] for e in found]) for arm, found in by_arm.items()}
    summary = []
    for arm, found in by_arm.items():
        interval = bootstrap_interval(tables[arm], rng)
        summary.append(
            {
                "arm": arm,
                "method": found[0]["method"],
                "seeds": len(found),
                "heldout_kl_mean": interval.mean,
                "heldout_kl_low": interval.low,
                "heldout_kl_high": interval.high,
                "heldout_ce_mean": _mean([e["heldout_ce"] for e in found]),
                "cut_kl_mean": _mean([e["cut_kl"] for e in found]),
                "repaired": any(e["repair"] is not None for e in found),
                "select_loss_mean": _mean([e["select_loss"] for e in found]),
                "cost_tokens_mean": _mean([e["cost_tokens"] for e in found]),
                "evaluations_mean": _mean([float(e["evaluations"]) for e in found]),
                "seconds_mean": _mean([e["seconds"] for e in found]),
            }
        )
    arms = list(by_arm)
    pairs = []
    for place, a in enumerate(arms):
        for b in arms[place + 1 :]:
            interval = paired_difference(tables[a], tables[b], rng)
            word = {-1: f"{a} is better", 1: f"{b} is better", 0: "no difference shown"}
            pairs.append(
                {
                    "a": a,
                    "b": b,
                    "difference": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "verdict": word[interval.side],
                }
            )
    dense = session.space.dense.key
    return {
        "version": __version__,
        "signature": session.signature(splits, seeds[0]) | {"seed": list(seeds)},
        "budget_text": session.space.budget.text,
        "cap": session.space.cap,
        "dense_cost": session.space.cost(session.space.dense),
        "dense": {
            "heldout_kl": _mean(kl_of[dense]),
            "heldout_ce": _mean(ce_of[dense]),
            "perplexity": float(np.exp(_mean(ce_of[dense]))),
        },
        "cost_tokens": _mean([e["cost_tokens"] for e in entries]),
        "arms": entries,
        "summary": summary,
        "pairs": pairs,
        "verdict": verdict(summary, pairs),
        "sites": [site.name for site in session.space.sites],
    }


def _heldout(
    session: Session,
    windows: Tensor,
    out: Path,
    masks: Sequence[str],
    entries: Sequence[Mapping[str, Any]],
    on_heldout: OnHeldout | None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """KL and cross-entropy by sequence: by mask as cut, and by run where that is repaired."""
    judge = session.judge(windows)
    batches = len(judge.sequences)
    repaired = [entry for entry in entries if entry["repair"] is not None]
    total = batches * (1 + len(repaired))

    def follow(done: int) -> OnHeldout | None:
        if on_heldout is None:
            return None
        return lambda batch, _: on_heldout(done * batches + batch, total)

    kl, ce = judge.figures([Mask.from_key(key) for key in masks], follow(0))
    kl_of = dict(zip(masks, kl.tolist(), strict=True))
    ce_of = dict(zip(masks, ce.tolist(), strict=True))
    for done, entry in enumerate(repaired):
        mask = Mask.from_key(entry["mask"])
        patches = load_patches(
            out / entry["run"] / REPAIR, session.anatomy, mask, entry["repair"]["sha256"]
        )
        with patched(session.loaded.model, session.anatomy, patches):
            kl, ce = judge.figures([mask], follow(done + 1))
        kl_of[entry["run"]], ce_of[entry["run"]] = kl[0].tolist(), ce[0].tolist()
    return kl_of, ce_of


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _stderr(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
