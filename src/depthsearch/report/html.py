"""From data to one self-contained page: no network, no script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from depthsearch import __version__
from depthsearch.errors import DepthsearchError, StorageError
from depthsearch.evaluation.student import critical_value
from depthsearch.journal import read_journal
from depthsearch.report import (
    calibration,
    comparison,
    figures,
    front,
    pairs,
    standing,
    tables,
    wording,
)
from depthsearch.report.data import RunData, read_run
from depthsearch.report.drawing import Picture
from depthsearch.report.tree import tree_picture
from depthsearch.run.directory import CALIBRATION, COMPARE, JOURNAL, sections, understood
from depthsearch.run.replaying import replayed
from depthsearch.searchers.mcts import MctsSearcher
from depthsearch.space import Mask

_STRIPS = 8


def run_report(run_dir: Path) -> str:
    """The report of one run as HTML, at any moment of the run.

    Raises RunDirectoryError or JournalError where the directory can't be read as a run.
    """
    run = read_run(run_dir)
    with understood(run_dir):
        return _run_report(run_dir, run)


def _run_report(run_dir: Path, run: RunData) -> str:
    return _render(
        "run.html.j2",
        run=run,
        model=_model_name(run),
        resume=f"depthsearch resume {run_dir}",
        headline=_headline(run),
        verdict=_verdict(run),
        cards=_cards(run),
        masks=figures.mask_picture(strips, run.space.sites, _fixed(run))
        if (strips := _strips(run))
        else None,
        cost=figures.cost_picture(run)
        if any(p.evaluation.loss is not None for p in run.points)
        else None,
        finals=figures.finals_picture(run) if any(e.loss is not None for e in run.finals) else None,
        dropped=figures.dropped_picture(run) if run.ranked else None,
        overfit=figures.overfit_picture(run.overfit) if run.overfit else None,
        overfit_verdict=str((run.overfit or {}).get("verdict", "")),
        elite=len(run.elite()),
        tree=_tree(run_dir, run),
        lineage=tables.lineage(run),
        trade=_trade(run),
        pairs=pairs.has_pairs(run),
        left_out=pairs.left_out(run),
        front_masks=front.front_masks(run),
        front_table=front.front_table(run) if run.front else None,
        best=tables.best_mask(run),
        top=tables.top_masks(run),
        search=tables.search_summary(run),
        exported=tables.exported(run.export),
        export_path=Path(str((run.export or {}).get("path", ""))).name,
        signature=tables.pairs(run.signature),
    )


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run directory and return its path."""
    return _write(run_dir / "report.html", run_report(run_dir))


def compare_html(compare: Mapping[str, Any]) -> str:
    """The report of a comparison as HTML; raises MaskError for unknown site names."""
    parts = sections(compare)
    return _render(
        "compare.html.j2",
        verdict=str(compare.get("verdict") or ""),
        cost_tokens=wording.amount(compare["cost_tokens"]) if compare.get("cost_tokens") else None,
        budget=str(parts[0].get("budget_text") or "") if len(parts) == 1 else "",
        dense=compare.get("dense") or {},
        parts=[_part(part) for part in parts],
        overview=standing.budgets_picture(parts),
        ranks=standing.ranks_table(compare),
        export=tables.exported(compare.get("export")),
        signature=tables.pairs(compare.get("signature") or {}),
        version=str(compare.get("version", "unknown")),
    )


def _part(compare: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of one budget."""
    sites = comparison.sites_from_names(compare["sites"])
    arms = compare["arms"]
    alike = comparison.searched_alike(arms)
    correlation = compare.get("correlation")
    return {
        "budget": str(compare.get("budget_text") or ""),
        "verdict": str(compare.get("verdict") or ""),
        "failed": compare.get("failed") or (),
        "summary": comparison.summary_table(compare),
        "intervals": comparison.interval_picture(compare.get("summary") or ()),
        "ranks": standing.ranks_table(compare),
        "pairs": comparison.pairs_table(compare),
        "masks": comparison.arms_picture(arms, sites),
        "course": standing.course_picture(compare),
        "anytime": comparison.anytime_picture(alike),
        "transfer": comparison.transfer_picture(alike),
        "others": ", ".join(
            dict.fromkeys(f"{a['name']} ({comparison.score_of(a)})" for a in arms if a not in alike)
        ),
        "carry": standing.carry_table(compare),
        "correlation": wording.correlation_text(correlation) if correlation else "",
        "runs": comparison.runs_table(arms, sites),
    }


def compare_report(compare: Mapping[str, Any], out: Path) -> Path:
    """Write the report of a comparison to `out`, a file or a folder, and return its path."""
    path = out / "report.html" if out.is_dir() else out
    with understood(path.parent / COMPARE):
        page = compare_html(compare)
    return _write(path, page)


def calibration_report(found: Mapping[str, Any], out: Path) -> Path:
    """Write the report of a calibration check to the file `out`, and return its path."""
    with understood(out.parent / CALIBRATION):
        page = _render(
            "calibration.html.j2",
            found=found,
            ranks=calibration.ranks_picture(found),
            curve=calibration.sizes_picture(found),
            gaps=calibration.gaps_picture(found),
            samples=calibration.samples_table(found),
            sizes=calibration.sizes_table(found),
            masks=calibration.masks_table(found),
            texts=calibration.texts_table(found),
            signature=tables.pairs(found["signature"]),
        )
    return _write(out, page)


def _tree(run_dir: Path, run: RunData) -> Picture | None:
    """The tree of a tree search; None for other methods, and where it can't be repeated."""
    if run.method != "mcts":
        return None
    try:
        searcher = replayed(read_journal(run_dir / JOURNAL))
    except DepthsearchError:
        return None
    assert isinstance(searcher, MctsSearcher)
    return tree_picture(searcher.tree(), run.space.sites, run.score)


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("depthsearch.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(written_by=__version__, **values)


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    return path


def _model_name(run: RunData) -> str:
    model = run.config.get("model")
    path = model.get("path") if isinstance(model, Mapping) else None
    return Path(str(path)).name if path else run.name


def _trade(run: RunData) -> Picture | None:
    """Quality against cost, or against one cost for each cap of another."""
    if not run.front:
        return None
    return pairs.pairs_picture(run) if pairs.has_pairs(run) else front.front_picture(run)


def _headline(run: RunData) -> str:
    if run.best is None:
        return "No mask on budget has been judged yet."
    cost, dense = run.space.cost(run.best), run.space.cost(run.space.dense)
    found = "Best mask" if run.end_reason else "Best mask so far"
    return (
        f"{found}: {len(run.best.dropped)} of {len(run.best)} sublayers dropped, "
        f"{wording.share(cost, dense)} of the dense model's "
        f"{wording.metric_name(run.space.budget.metric, inside=True)} kept."
    )


def _verdict(run: RunData) -> str:
    """Whether search helped, said plainly."""
    if run.best is None:
        return ""
    if not run.finals:
        return (
            "The finalists have not been ranked on fresh data yet, so a lower search loss may "
            "still be overfitting."
        )
    if run.best == run.best_baseline:
        return (
            f"The answer is itself a baseline ({run.origin(run.best)}): on fresh data the search "
            "found nothing that is better by more than noise."
        )
    if run.best_baseline is None:
        return (
            "No baseline was among the finalists, so there is nothing to hold the result against."
        )
    against = f"the best baseline ({run.origin(run.best_baseline)})"
    if run.lead_on_baseline is None:
        return f"It was not measured on the same fresh sequences as {against}."
    lead, error = run.lead_on_baseline
    # The answer is the best of several finalists on the text that it is judged by (Bonferroni).
    others = max(1, sum(mask not in run.baselines for mask in run.fresh))
    bar = critical_value(0.025 / others, max(1, len(run.fresh[run.best].losses) - 1))
    unit = wording.loss_unit(run.objective)
    measured = f"{abs(lead):.4f} ± {error:.4f} {unit} on the same fresh sequences"
    if abs(lead) <= bar * error:
        return f"It can't be told apart from {against}: the difference is {measured}."
    return f"It is {'better' if lead > 0 else 'worse'} than {against} by {measured}."


def _cards(run: RunData) -> list[tuple[str, str, str]]:
    """Key figures as (title, figure, remark)."""
    cards: list[tuple[str, str, str]] = []
    if run.best is not None:
        fresh, point = run.fresh.get(run.best), run.by_mask.get(run.best)
        evaluation = fresh or (point.evaluation if point else None)
        if evaluation is not None:
            where = "on fresh data" if fresh else "on search data"
            error = f"± {evaluation.stderr:.4f} " if evaluation.stderr is not None else ""
            unit = wording.loss_unit(run.objective if fresh else run.score)
            cards.append(("Loss", f"{evaluation.loss or 0:.4f}", f"{error}{unit} {where}"))
        metric = run.space.budget.metric
        cost = run.space.cost(run.best)
        cards.append(
            (
                wording.metric_name(metric),
                wording.amount(cost, metric),
                f"allowed {wording.amount(run.space.cap, metric)}, "
                f"dense {wording.amount(run.space.cost(run.space.dense), metric)}",
            )
        )
        cards.append(
            (
                "Dropped",
                f"{len(run.best.dropped)} sublayers",
                f"of {len(run.best)}, in {_count(len(run.best.runs), 'stretch', 'stretches')}",
            )
        )
    cards.append(
        (
            "Search",
            f"{len(run.points):,} evaluations",
            f"{wording.amount(run.cost_tokens)} dense-equivalent tokens",
        )
    )
    return cards


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _strips(run: RunData) -> list[figures.Strip]:
    named: dict[Mask, list[str]] = {}
    for mask, name in (
        (run.best, "best mask" if run.end_reason else "best mask so far"),
        (run.best_baseline, "best baseline"),
        (run.best_greedy, "greedy"),
    ):
        if mask is not None:
            named.setdefault(mask, []).append(name)
    others = [e.mask for e in sorted(run.finals, key=lambda e: e.order)] or [
        p.mask for p in run.ranked
    ]
    for place, mask in enumerate(others, start=1):
        if len(named) < _STRIPS:
            named.setdefault(mask, []).append(
                f"finalist {place}" if run.finals else f"rank {place}"
            )
    strips = []
    for mask, names in named.items():
        point, fresh = run.by_mask.get(mask), run.fresh.get(mask)
        details = [wording.shorten(run.origin(mask), 36)]
        if point is not None and point.evaluation.loss is not None:
            details.append(f"search loss {wording.loss(point.evaluation.loss)}")
        if fresh is not None and fresh.loss is not None:
            details.append(f"fresh loss {wording.loss(fresh.loss, fresh.stderr)}")
        title = " = ".join(names)
        strips.append(figures.Strip(mask, title[0].upper() + title[1:], " · ".join(details)))
    return strips


def _fixed(run: RunData) -> frozenset[int]:
    return frozenset(range(len(run.space.sites))) - run.space.free
