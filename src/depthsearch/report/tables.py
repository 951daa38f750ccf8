"""The tables of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from depthsearch.report import wording
from depthsearch.report.data import Point, RunData, flatten
from depthsearch.space import METRICS, Evaluation, Mask, Site, cost_text

_STATUS = {
    "ok": "judged on all search data",
    "eliminated": "stopped early by the race",
    "non_finite": "failed: loss not finite",
    "out_of_memory": "failed: out of memory",
    "timed_out": "failed: out of time",
    "failed": "failed",
}
_TOP = 10
_LAST = 12
"""Changes of the best mask that are listed, besides the first."""


_EXPORT_ROWS = (
    ("parameters", "Parameters", "params"),
    ("disk_bytes", "Size on disk", "bytes"),
    ("kv_bytes_per_token", "KV cache per token", "bytes"),
    ("perplexity", "Held-out perplexity", ""),
    ("chrf", "chrF++ of texts written", ""),
    ("prefill_tokens_per_s", "Prefill, tokens/s", ""),
    ("decode_tokens_per_s", "Decode, tokens/s", ""),
    ("peak_memory_bytes", "Peak memory", "bytes"),
)


@dataclass(frozen=True)
class Table:
    """Column titles and rows of text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def best_mask(run: RunData) -> Table | None:
    """What the best mask drops, what it costs, and what it loses."""
    if run.best is None:
        return None
    space, mask = run.space, run.best
    point, fresh = run.by_mask.get(mask), run.fresh.get(mask)
    rows = [
        ("Found by", run.origin(mask)),
        ("Drops", wording.stretches(mask, space.sites)),
        ("Dropped sites", ", ".join(space.sites[i].name for i in mask.dropped) or "none"),
        ("Loss on search data", _loss_of(point.evaluation if point else None)),
        ("Loss on fresh data", _loss_of(fresh)),
        ("Budget", space.budget.text),
    ]
    metric = space.budget.metric
    name, costs = wording.metric_name(metric), space.budget.costs(space.costs, space.sites)
    dense = costs.fixed + costs.blocks
    for title, cost in ((name, space.cost(mask)), ("· allowed", space.cap), ("· dense", dense)):
        parts = [f"{wording.share(cost, dense)} of the dense model"]
        if costs.fixed:
            # Embeddings and head can't be dropped: what the blocks keep is the usual "sparsity".
            parts.append(f"{wording.share(cost - costs.fixed, costs.blocks)} of its blocks")
        rows.append((title, f"{cost_text(metric, cost)} ({', '.join(parts)})"))
    for other in (m for m in METRICS if m != metric and m in space.costs.metrics):
        cost, whole = space.costs.cost(other, mask), space.costs.total(other)
        part = wording.share(cost, whole)
        own, all_of_it = wording.amount(cost, other), wording.amount(whole, other)
        rows.append((wording.metric_name(other), f"{own} of {all_of_it} ({part})"))
    return Table(("", ""), tuple(rows))


def top_masks(run: RunData) -> Table:
    """The masks with the lowest search losses."""
    rows = []
    metric = run.space.budget.metric
    for place, point in enumerate(run.ranked[:_TOP], start=1):
        rows.append(
            (
                str(place),
                point.origin,
                wording.stretches(point.mask, run.space.sites),
                _loss_of(point.evaluation),
                _loss_of(run.fresh.get(point.mask)),
                wording.amount(run.space.cost(point.mask), metric),
            )
        )
    return Table(
        ("", "Found by", "Drops", "Search loss", "Fresh loss", wording.metric_name(metric)),
        tuple(rows),
    )


def lineage(run: RunData) -> Table:
    """The best mask so far each time that it changed, and what it then dropped or put back."""
    found: list[Point] = []
    for _, points in groupby(run.points, key=lambda point: point.cost_tokens):
        best = min((p for p in points if p.complete), key=_order, default=None)
        if best is not None and (not found or _order(best)[1] < _order(found[-1])[1]):
            found.append(best)
    rows = []
    for place, point in enumerate(found):
        changes = "" if place else wording.stretches(point.mask, run.space.sites)
        if place:
            changes = _changes(found[place - 1].mask, point.mask, run.space.sites)
        rows.append(
            (wording.amount(point.cost_tokens), point.origin, _loss_of(point.evaluation), changes)
        )
    return Table(
        ("At cost, tokens", "Found by", "Search loss", "Drops, then what changed"),
        tuple(rows[:1] + rows[1:][-_LAST:]),
    )


def _order(point: Point) -> tuple[int, float, str]:
    return point.evaluation.order


def _changes(before: Mask, after: Mask, sites: Sequence[Site]) -> str:
    parts = []
    for verb, old, new in (("drops", before, after), ("puts back", after, before)):
        mask = Mask.dropping(len(new), sorted(set(new.dropped) - set(old.dropped)))
        if mask.dropped:
            parts.append(f"{verb} {wording.stretches(mask, sites)}")
    return ", ".join(parts)


def search_summary(run: RunData) -> Table:
    """What the search did and spent."""
    kinds = [run.score] if run.score == run.objective else [run.score, run.objective]
    rows = [
        ("State", f"finished ({run.end_reason})" if run.end_reason else "not finished"),
        ("Evaluations", f"{len(run.points):,}"),
    ]
    rows += [(f"· {_STATUS[s]}", f"{run.by_status[s]:,}") for s in _STATUS if s in run.by_status]
    rows += [(f"· from {name}", f"{n:,}") for name, n in run.by_family.items()]
    judged = sum(p.evaluation.tokens for p in run.points)
    rows += [
        ("Calibration tokens judged", f"{judged:,}"),
        ("Search cost", f"{run.cost_tokens:,.0f} dense-equivalent tokens"),
    ]
    for kind, what in zip(kinds, ("Loss", "Loss of the finalists"), strict=False):
        rows.append((what, f"{wording.loss_name(kind)}, {wording.loss_unit(kind)}"))
    rows.append(("Time from first to last record", wording.duration(run.seconds)))
    return Table(("", ""), tuple(rows))


def exported(data: Mapping[str, Any] | None) -> Table | None:
    """The exported model beside the dense one, with ratios; None where nothing was measured."""
    models = (data or {}).get("rows") or []
    if not models:
        return None
    first, others = models[0], models[1:]
    columns = ["", str(first["name"])]
    for model in others:
        columns += [str(model["name"]), f"÷ {first['name']}"]
    rows = []
    for key, title, metric in _EXPORT_ROWS:
        if all(model.get(key) is None for model in models):
            continue
        cells = [title, _figure(first.get(key), metric)]
        for model in others:
            own, base = model.get(key), first.get(key)
            cells.append(_figure(own, metric))
            cells.append(f"{own / base:.2f}×" if own is not None and base else wording.NONE)
        rows.append(tuple(cells))
    return Table(tuple(columns), (*rows, *_steps((data or {}).get("latency"))))


def _steps(latency: Mapping[str, Any] | None) -> list[tuple[str, ...]]:
    """The decoding step of a dense and an exported model, measured and as its table said."""
    rows: list[tuple[str, ...]] = []
    if not latency:
        return rows
    for how in ("measured", "predicted"):
        times = {name: 1e6 * ms for name, ms in latency[f"{how}_ms"].items()}
        title = f"Decoding step behind {latency['table']['context_tokens']:,} tokens, {how}"
        cells = [wording.amount(times[name], "latency") for name in ("dense", "pruned")]
        rows.append((title, *cells, f"{latency[f'{how}_ratio']:.2f}×"))
    return rows


def _figure(value: float | None, metric: str) -> str:
    if value is None:
        return wording.NONE
    return wording.amount(value, metric) if metric else f"{value:.4g}"


def _loss_of(evaluation: Evaluation | None) -> str:
    return wording.NONE if evaluation is None else wording.loss(evaluation.loss, evaluation.stderr)


def pairs(data: Mapping[str, Any]) -> Table:
    """Nested plain data, one dotted name a row."""
    return Table(("", ""), tuple(flatten(data)))
