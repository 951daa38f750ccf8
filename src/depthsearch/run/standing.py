"""What measured runs add up to: intervals, ranks and what carries over, at each budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depthsearch.run.anytime import Improvement, Step, course
from depthsearch.run.heldout import Heldout
from depthsearch.run.statistics import (
    bootstrap_interval,
    difference_among,
    paired_difference,
    rank_correlation,
    standings,
)
from depthsearch.run.verdict import ONE_PASS, verdict, warnings_of

Entries = Sequence[Mapping[str, Any]]

NOTHING: dict[str, Any] = {
    "cost_tokens": None,
    "arms": [],
    "summary": [],
    "pairs": [],
    "ranks": [],
    "anytime": [],
    "correlation": None,
    "warnings": [],
    "verdict": "No arm finished with every seed.",
}
"""The section of a budget at which no arm finished with every seed."""


def measured_entry(
    entry: Mapping[str, Any], shown: Sequence[Improvement], heldout: Heldout
) -> dict[str, Any]:
    """A run with its held-out figures, and those of the masks `shown` from its course.

    `gap` is the held-out loss minus the loss on search data, of the mask as the search judged it;
    None where it judged something that is not measured on held-out text.
    """
    figures, cut = heldout.of(entry["run"], entry["mask"]), heldout.cut[entry["mask"]]
    same = _alike(entry, entry["mask"], heldout)
    return {
        **entry,
        "heldout_kl": _mean(figures.kl),
        "heldout_kl_stderr": _stderr(figures.kl),
        "heldout_ce": _mean(figures.ce),
        "heldout_ce_stderr": _stderr(figures.ce),
        "heldout_losses": list(figures.kl),
        "cut_kl": _mean(cut.kl),
        "cut_ce": _mean(cut.ce),
        "gap": None if same is None else _mean(same) - entry["select_loss"],
        "anytime_heldout": [
            {
                "cost_tokens": found.cost_tokens,
                "select_loss": found.loss,
                "heldout_kl": _mean(heldout.of(entry["run"], found.mask).kl),
                "mask": found.mask,
            }
            for found in shown
        ],
    }


def section(
    arms: Sequence[str], entries: Entries, heldout: Heldout, anytime: bool
) -> dict[str, Any]:
    """Everything that the runs at one budget add up to, by arm in the order of `arms`."""
    rng = np.random.default_rng(0)
    groups = {arm: [entry for entry in entries if entry["name"] == arm] for arm in arms}
    by_arm = {arm: found for arm, found in groups.items() if found}
    tables = {arm: _losses(found) for arm, found in by_arm.items()}
    summary = [_row(arm, found, tables[arm], rng) for arm, found in by_arm.items()]
    pairs = pairs_of(tables, rng)
    methods = {arm: found[0]["method"] for arm, found in by_arm.items()}
    add_among(pairs, tables, methods)
    add_picked(pairs, tables, methods)
    # What came later draws from a generator of its own: the figures above stay as they were.
    rng = np.random.default_rng(1)
    for row, found in zip(summary, by_arm.values(), strict=True):
        row |= _gap(found, heldout, rng)
    courses = (
        [{"arm": arm, **_course(found, heldout, rng)} for arm, found in by_arm.items()]
        if anytime
        else []
    )
    correlation = _correlation(entries, heldout, rng)
    # Leads are held against held-out KL, where results are what the search judged, and by it.
    alike: dict[str, list[dict[str, Any]]] = {}
    for row, found in zip(summary, by_arm.values(), strict=True):
        judged, finished = _kind(found[0])
        if judged == finished and found[0]["score"] == "kl":
            alike.setdefault(judged, []).append(row)
    warnings = warnings_of(list(alike.values()), pairs, courses, correlation)
    return {
        "cost_tokens": _mean([e["cost_tokens"] for e in entries]),
        "arms": list(entries),
        "summary": summary,
        "pairs": pairs,
        "ranks": ranks_of([entries]),
        "anytime": courses,
        "correlation": correlation,
        "warnings": warnings,
        "verdict": verdict(summary, pairs, warnings),
    }


def ranks_of(budgets: Sequence[Entries]) -> list[dict[str, Any]]:
    """Mean ranks over seeds and budgets, best first, of the arms that finished at every budget."""
    names = [dict.fromkeys(entry["name"] for entry in entries) for entries in budgets]
    arms = [arm for arm in names[0] if all(arm in others for others in names)] if names else []
    if not arms:
        return []
    tables = [
        np.array([_losses([e for e in entries if e["name"] == arm]) for arm in arms])
        for entries in budgets
    ]
    found = standings(tables, np.random.default_rng(2))
    rows = [
        {
            "arm": arm,
            "rank_mean": standing.rank.mean,
            "rank_low": standing.rank.low,
            "rank_high": standing.rank.high,
            "first_share": standing.first,
        }
        for arm, standing in zip(arms, found, strict=True)
    ]
    return sorted(rows, key=lambda row: (row["rank_mean"], -row["first_share"]))


def _row(arm: str, found: Entries, table: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    interval = bootstrap_interval(table, rng)
    return {
        "arm": arm,
        "method": found[0]["method"],
        "seeds": len(found),
        "heldout_kl_mean": interval.mean,
        "heldout_kl_low": interval.low,
        "heldout_kl_high": interval.high,
        "heldout_ce_mean": _mean([e["heldout_ce"] for e in found]),
        "cut_kl_mean": _mean([e["cut_kl"] for e in found]),
        "baselines": [e["baseline"] for e in found if e["baseline"] is not None],
        "repaired": any(e["repair"] is not None for e in found),
        "finish": _kind(found[0])[1],
        "select_loss_mean": _mean([e["select_loss"] for e in found]),
        "cost_tokens_mean": _mean([e["cost_tokens"] for e in found]),
        "evaluations_mean": _mean([float(e["evaluations"]) for e in found]),
        "seconds_mean": _mean([e["seconds"] for e in found]),
    }


def pairs_of(tables: Mapping[str, np.ndarray], rng: np.random.Generator) -> list[dict[str, Any]]:
    """The paired difference of every two arms, each at 95 % on its own."""
    arms, pairs = list(tables), []
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
    return pairs


def add_among(
    pairs: Sequence[dict[str, Any]], tables: Mapping[str, np.ndarray], methods: Mapping[str, str]
) -> None:
    """Add to each pair `among` how many comparisons its difference is shown, 0 where it is not.

    That is 1, the number of pairs of a search and a method without one, or that of all pairs: what
    the verdict picks from (see `difference_among`).
    """
    rng = np.random.default_rng(3)
    mixed = [_is_mixed(pair, methods) for pair in pairs]
    for pair, counts in zip(pairs, mixed, strict=True):
        side = int(pair["low"] > 0) - int(pair["high"] < 0)
        pair["among"] = abs(side)
        for comparisons in sorted({sum(mixed) if counts else 1, len(pairs)} - {1}):
            a, b = tables[pair["a"]], tables[pair["b"]]
            if pair["among"] and difference_among(a, b, comparisons, rng).side == side:
                pair["among"] = comparisons


def add_picked(
    pairs: Sequence[dict[str, Any]], tables: Mapping[str, np.ndarray], methods: Mapping[str, str]
) -> None:
    """Add to pairs of a search and a method without one the interval of all of them together.

    `picked_low` and `picked_high` hold with 95 % for all such pairs at once (Bonferroni), so also
    for the one that the figures make interesting.
    """
    rng = np.random.default_rng(4)
    mixed = [pair for pair in pairs if _is_mixed(pair, methods)]
    for pair in mixed:
        a, b = tables[pair["a"]], tables[pair["b"]]
        interval = difference_among(a, b, len(mixed), rng)
        pair |= {"picked_low": interval.low, "picked_high": interval.high}


def _is_mixed(pair: Mapping[str, Any], methods: Mapping[str, str]) -> bool:
    """Whether it is of a search and a method without one."""
    return len({methods[pair[side]] in ONE_PASS for side in ("a", "b")}) == 2


def _gap(found: Entries, heldout: Heldout, rng: np.random.Generator) -> dict[str, float | None]:
    """Held-out minus search loss with an interval over seeds and held-out windows."""
    if any(entry["gap"] is None for entry in found):
        return {"gap_mean": None, "gap_low": None, "gap_high": None}
    losses = [_alike(entry, entry["mask"], heldout) for entry in found]
    select = np.array([[entry["select_loss"]] for entry in found])
    interval = bootstrap_interval(np.array(losses) - select, rng)
    return {"gap_mean": interval.mean, "gap_low": interval.low, "gap_high": interval.high}


def _course(found: Entries, heldout: Heldout, rng: np.random.Generator) -> dict[str, Any]:
    runs = []
    for entry in found:
        steps = [
            Step(shown["cost_tokens"], heldout.of(entry["run"], shown["mask"]).kl)
            for shown in entry["anytime_heldout"]
        ]
        answer = Step(entry["cost_tokens"], heldout.of(entry["run"], entry["mask"]).kl)
        runs.append([*steps, answer])
    return course(runs, rng)


def _correlation(
    entries: Entries, heldout: Heldout, rng: np.random.Generator
) -> dict[str, Any] | None:
    """Whether masks rank alike on search data and on held-out text.

    Compared are masks that were judged by one loss on the same text and repaired alike.
    """
    groups: dict[tuple[Any, ...], dict[tuple[float, ...], float]] = {}
    for entry in entries:
        # A mask that several arms found counts once.
        group = groups.setdefault((entry["seed"], entry["score"], _kind(entry)), {})
        known = {shown["mask"]: shown["select_loss"] for shown in entry["anytime_heldout"]}
        for mask, loss in {entry["mask"]: entry["select_loss"], **known}.items():
            losses = _alike(entry, mask, heldout)
            group[losses or heldout.of(entry["run"], mask).kl] = loss
    tables = [(list(group.values()), list(group)) for group in groups.values()]
    correlation = rank_correlation(tables, rng)
    if correlation is None:
        return None
    interval = correlation.interval
    return {
        "spearman": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "masks": correlation.masks,
    }


def _alike(entry: Mapping[str, Any], mask: str, heldout: Heldout) -> tuple[float, ...] | None:
    """Held-out losses by window of a mask as the search judged it, None where not measured."""
    judged, finished = _kind(entry)
    if judged not in ("none", finished):
        return None
    figures = heldout.cut[mask] if judged == "none" else heldout.of(entry["run"], mask)
    return {"kl": figures.kl, "cross_entropy": figures.ce}.get(entry["score"])


def _kind(entry: Mapping[str, Any]) -> tuple[str, str]:
    """How masks were repaired in the search, and its result at the end."""
    repair, nats = entry["repair"], entry.get("toward_text", 0.0)
    finished = "none" if repair is None else str(repair["kind"])
    if repair is not None and nats:
        finished += f", {nats:g} nats toward the text"
    return str(entry["search_repair"]), finished


def _losses(found: Entries) -> np.ndarray:
    """[seeds, windows]: held-out KL of the runs of one arm."""
    return np.array([entry["heldout_losses"] for entry in found])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _stderr(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
