"""The front of a run over several budgets: quality against cost, and the mask at each budget."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.lines import Line2D

from depthsearch.report import wording
from depthsearch.report.data import FrontEntry, RunData
from depthsearch.report.drawing import (
    ACCENT,
    GREY,
    INK,
    MANY_DOTS,
    Picture,
    canvas,
    loss_axis,
    picture,
)
from depthsearch.report.figures import Strip, mask_picture
from depthsearch.report.tables import Table
from depthsearch.run.points import paired_lead
from depthsearch.space import METRICS, Status, front_of


def front_picture(run: RunData) -> Picture | None:
    """Search loss against each metric of the budgets, beaten masks in grey; None without a loss."""
    known = [p.evaluation for p in run.by_mask.values() if p.evaluation.status is Status.OK]
    if not known:
        return None
    front = {evaluation.mask for evaluation in front_of(run.space, known)}
    entries = [entry for entry in run.front if entry.best is not None]
    spaces = {entry.space.budget.metric: entry.space for entry in run.front}
    with canvas(9.6, 3.9) as figure:
        axes = figure.subplots(1, len(spaces), squeeze=False)[0]
        for axis, (metric, space) in zip(axes, spaces.items(), strict=True):
            dense = space.cost(space.dense) or 1
            for kept, color, size in ((False, "#c4cad1", 3.0), (True, ACCENT, 4.5)):
                mine = [e for e in known if (e.mask in front) == kept]
                axis.plot(
                    [100 * space.cost(e.mask) / dense for e in mine],
                    [e.loss or 0.0 for e in mine],
                    linestyle="",
                    marker="o",
                    markersize=size,
                    markeredgewidth=0,
                    color=color,
                    rasterized=len(known) > MANY_DOTS,
                )
            line = staircase(
                [(100 * space.cost(e.mask) / dense, e.loss or 0.0) for e in known],
            )
            axis.plot(
                [x for x, _ in line],
                [y for _, y in line],
                drawstyle="steps-post",
                color=ACCENT,
                linewidth=1.0,
                zorder=1,
            )
            for entry in entries:
                if entry.best is None or entry.space.budget.metric != metric:
                    continue
                x, y = 100 * space.cost(entry.best.mask) / dense, entry.best.evaluation.loss or 0.0
                axis.axvline(
                    100 * entry.space.cap / dense, color=GREY, linestyle=":", linewidth=0.8
                )
                axis.plot([x], [y], marker="D", markersize=6, color=INK, zorder=3)
                axis.annotate(
                    str(entry.number),
                    (x, y),
                    textcoords="offset points",
                    xytext=(7, 4),
                    weight="bold",
                )
            axis.set_xlabel(f"{wording.metric_name(metric)}, % of the dense model's")
            axis.set_ylabel(f"search loss, {wording.loss_unit(run.score)}\n({run.score})")
            highest = max((e.best.evaluation.loss or 0.0 for e in entries if e.best), default=0.0)
            losses = [e.loss or 0.0 for e in known]
            # What lies far above the answers would squeeze them flat.
            loss_axis(axis, "y", min(losses), min(max(losses), 2 * highest) or max(losses))
        handles = [
            Line2D([], [], linestyle="", marker="o", color="#c4cad1", label="beaten"),
            Line2D([], [], linestyle="", marker="o", color=ACCENT, label="on the front"),
            Line2D([], [], linestyle="", marker="D", color=INK, label="answer at a budget"),
            Line2D([], [], linestyle=":", color=GREY, label="what a budget allows"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncol=4)
        said = "; ".join(
            f"{entry.number}: {entry.space.budget.text}, "
            f"{wording.loss(entry.best.evaluation.loss)} {wording.loss_unit(run.score)}"
            for entry in entries
            if entry.best is not None
        )
        return picture(figure, f"Search loss of {len(known)} masks against cost. {said}.")


def staircase(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the lowest loss at each cost or below, as (cost, loss) by rising cost."""
    line: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not line or loss < line[-1][1]:
            line.append((cost, loss))
    return line


def front_masks(run: RunData) -> Picture | None:
    """One strip for each budget that has a mask."""
    strips = []
    for entry in run.front:
        if entry.best is None:
            continue
        losses = [f"search loss {wording.loss(entry.best.evaluation.loss)}"]
        if entry.fresh is not None:
            losses.append(f"fresh loss {wording.loss(entry.fresh.loss, entry.fresh.stderr)}")
        title = f"{entry.number}: {entry.space.budget.text}"
        origin = wording.shorten(entry.best.origin, 28)
        strips.append(Strip(entry.best.mask, title, " · ".join([origin, *losses])))
    fixed = frozenset(range(len(run.space.sites))) - run.space.free
    return mask_picture(strips, run.space.sites, fixed) if strips else None


def front_table(run: RunData) -> Table:
    """The answers with their losses and their costs in every metric."""
    others = [m for m in METRICS if m in run.space.costs.metrics]
    rows = []
    for entry in run.front:
        cells = [str(entry.number), entry.space.budget.text]
        if entry.best is None:
            rows.append((*cells, "none found", *[wording.NONE] * (3 + len(others))))
            continue
        mask, found, fresh = entry.best.mask, entry.best.evaluation, entry.fresh
        costs = run.space.costs
        rows.append(
            (
                *cells,
                entry.best.origin,
                wording.loss(found.loss, found.stderr),
                wording.NONE if fresh is None else wording.loss(fresh.loss, fresh.stderr),
                _lead(entry),
                *(wording.share(costs.cost(m, mask), costs.total(m)) for m in others),
            )
        )
    titles = ("Point", "Budget", "Found by", "Search loss", "Fresh loss", "Ahead of best baseline")
    return Table((*titles, *(wording.metric_name(m) for m in others)), tuple(rows))


def _lead(entry: FrontEntry) -> str:
    """How much lower the answer's fresh loss is than the best baseline's, with its error."""
    if entry.fresh is None or entry.baseline is None:
        return wording.NONE
    if entry.fresh.mask == entry.baseline.mask:
        return "is one"
    lead = paired_lead(entry.fresh, entry.baseline)
    return wording.NONE if lead is None else f"{wording.signed(lead[0])} ± {lead[1]:.4f}"
