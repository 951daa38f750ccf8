"""The pictures of one run; each function takes data and returns a `Picture`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from depthsearch.report import wording
from depthsearch.report.data import RunData
from depthsearch.report.drawing import (
    ACCENT,
    DROPPED,
    GREY,
    INK,
    MANY_DOTS,
    PALE,
    Picture,
    canvas,
    cost_axis,
    loss_axis,
    picture,
    style_of,
)
from depthsearch.space import KINDS, Evaluation, Mask, Site, Status


@dataclass(frozen=True)
class Strip:
    """One mask to draw, with its title and a line of figures."""

    mask: Mask
    title: str
    detail: str


def mask_picture(
    strips: Sequence[Strip], sites: Sequence[Site], fixed: frozenset[int] = frozenset()
) -> Picture:
    """One strip a mask: a column a block, a row a kind of sublayer, dropped ones dark and numbered.

    `fixed` sites could not be dropped in this search: they are drawn hollow, and a kind of which
    none could be dropped is left out.
    """
    columns = _columns(sites)
    shown = [s for s in sites if s.index not in fixed] or list(sites)
    kinds = [k for k in KINDS if any(site.kind == k for site in shown)]
    places = {
        site.index: (columns[site.stack, site.block], kinds.index(site.kind))
        for site in sites
        if site.kind in kinds
    }
    width = max(columns.values()) + 1
    size = max(3.5, min(7.5, 300 / width))
    row = 0.24 * len(kinds) + 0.52
    with canvas(9.6, row * len(strips) + 0.62) as figure:
        axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
        for axis, strip in zip(axes, strips, strict=True):
            axis.set_xlim(-0.1, width + 0.1)
            axis.set_ylim(len(kinds) + 0.05, -0.05)
            axis.grid(False)
            axis.spines[:].set_visible(False)
            for index, (x, y) in places.items():
                gone = not strip.mask.keep[index]
                hollow = index in fixed and not gone
                cell = axis.add_patch(
                    Rectangle(
                        (x + 0.06, y + 0.07),
                        0.88,
                        0.86,
                        facecolor=DROPPED if gone else "white" if hollow else PALE,
                        edgecolor=DROPPED if gone else "#c3ccd6",
                        linewidth=0.6,
                    )
                )
                # The layout need not measure every cell: they lie within the axes.
                cell.set_in_layout(False)
                if gone:
                    number = axis.text(
                        x + 0.5,
                        y + 0.52,
                        str(sites[index].block),
                        ha="center",
                        va="center",
                        color="white",
                        fontsize=size,
                        weight="bold",
                    )
                    number.set_in_layout(False)
            axis.set_yticks(
                [n + 0.5 for n in range(len(kinds))], [wording.KIND_NAMES[k] for k in kinds]
            )
            axis.tick_params(length=0, labelsize=8)
            axis.set_title(strip.title, loc="left", fontsize=9.5, weight="bold", pad=4)
            axis.set_title(strip.detail, loc="right", fontsize=8.5, color="#3d454e", pad=4)
            axis.set_xticks([])
        _block_ticks(axes[-1], columns)
        handles = [
            Patch(facecolor=DROPPED, edgecolor=DROPPED, label="dropped (with its block number)"),
            Patch(facecolor=PALE, edgecolor="#c3ccd6", label="kept"),
        ]
        if fixed.intersection(places):
            handles.append(
                Patch(facecolor="white", edgecolor="#c3ccd6", label="not searched: always kept")
            )
        figure.legend(handles=handles, loc="outside lower center", ncol=3)
        titles = "; ".join(
            f"{strip.title} drops {wording.stretches(strip.mask, sites)}" for strip in strips
        )
        return picture(figure, f"Kept and dropped sublayers. {titles}.")


def cost_picture(run: RunData) -> Picture:
    """Loss of every evaluation against what the search had spent, and the best so far."""
    shown = [p for p in run.points if p.evaluation.loss is not None]
    finals = [p for p in shown if p.final]
    with canvas(9.6, 4.1) as figure:
        axis = figure.add_subplot()
        heavy = len(shown) > MANY_DOTS
        losses = [p.evaluation.loss for p in finals or shown if p.evaluation.loss is not None]
        families = list(dict.fromkeys(p.family for p in shown))
        handles: list[Line2D] = []
        steps = [p for p in shown if not p.final]
        if steps and finals:
            axis.plot(
                [p.cost_tokens for p in steps],
                [p.evaluation.loss or 0.0 for p in steps],
                linestyle="",
                marker=".",
                markersize=2.5,
                color="#c4cad1",
                rasterized=heavy,
            )
            handles.append(_handle("above the budget (steps on the way)", "#c4cad1", "."))
        for family in families:
            color, marker = style_of(family, families)
            mine = [p for p in (finals or shown) if p.family == family]
            for status in (Status.ELIMINATED, Status.OK):
                dots = [p for p in mine if p.evaluation.status is status]
                axis.plot(
                    [p.cost_tokens for p in dots],
                    [p.evaluation.loss or 0.0 for p in dots],
                    linestyle="",
                    marker=marker,
                    markersize=4.5,
                    color=color,
                    alpha=0.8,
                    markerfacecolor=color if status is Status.OK else "none",
                    markeredgewidth=0.8,
                    rasterized=heavy,
                )
            if mine:
                handles.append(_handle(f"{family} ({len(mine)})", color, marker))
        if any(p.evaluation.status is Status.ELIMINATED for p in finals):
            handles.append(
                Line2D(
                    [],
                    [],
                    linestyle="",
                    marker="o",
                    color=GREY,
                    markerfacecolor="none",
                    label="hollow: stopped early by the race",
                )
            )
        line = running_best([(p.cost_tokens, p.evaluation.loss) for p in finals if p.complete])
        if line:
            line.append((run.cost_tokens, line[-1][1]))
            axis.plot(
                [x for x, _ in line],
                [y for _, y in line],
                drawstyle="steps-post",
                color=INK,
                linewidth=1.6,
            )
            handles.insert(0, Line2D([], [], color=INK, linewidth=1.6, label="best so far"))
        base = run.by_mask.get(run.best_baseline) if run.best_baseline else None
        if base is not None and base.evaluation.loss is not None:
            axis.axhline(base.evaluation.loss, color=ACCENT, linestyle=(0, (4, 3)), linewidth=1.1)
            label = (
                f"best baseline: {wording.shorten(base.origin, 30)} ({base.evaluation.loss:.4f})"
            )
            handles.insert(
                1 if line else 0, Line2D([], [], color=ACCENT, linestyle=(0, (4, 3)), label=label)
            )
        cost_axis(axis)
        unit = wording.loss_unit(run.score)
        axis.set_ylabel(f"search loss, {unit}\n({wording.loss_name(run.score)})")
        if losses:
            low, high = min(losses), max(losses)
            if len(steps) > len(finals):
                # The dense model's own loss can be zero, which no axis needs to reach.
                low = max(low / 20, min([low, *(p.evaluation.loss or low for p in steps)]))
            # The contest is near the best; what lies far above it would squeeze it flat.
            high = min(high, max([2 * low, *(y for _, y in line)]))
            beyond = sum(loss > high for loss in losses)
            if beyond:
                handles.append(
                    Line2D([], [], linestyle="", label=f"({beyond} worse: above the frame)")
                )
            loss_axis(axis, "y", low, high)
        figure.legend(handles=handles, loc="outside right upper", labelspacing=0.7)
        best = f"; the best reaches {line[-1][1]:.4f} {unit}" if line else ""
        return picture(
            figure, f"Search loss of {len(shown)} evaluations against search cost{best}."
        )


def finals_picture(run: RunData) -> Picture:
    """Each finalist's loss on the data it was selected on, and on fresh data."""
    finalists = sorted(
        (e for e in run.finals if e.loss is not None), key=lambda e: e.order, reverse=True
    )
    with canvas(9.6, 0.34 * len(finalists) + 1.25) as figure:
        axis = figure.add_subplot()
        ends: list[float] = []
        for y, fresh in enumerate(finalists):
            point = run.by_mask.get(fresh.mask)
            # Losses of two kinds have no axis in common.
            search = point.evaluation if point and run.score == run.objective else None
            if search is not None and search.loss is not None:
                axis.plot(
                    [search.loss, fresh.loss or 0.0], [y, y], color="#c3ccd6", linewidth=2, zorder=1
                )
                ends += _error_bar(axis, search, y + 0.13, GREY, "o", hollow=True)
            color = (
                INK
                if fresh.mask == run.best
                else ACCENT
                if fresh.mask in run.baselines
                else "#aa3377"
            )
            marker = "s" if fresh.mask in run.baselines else "o"
            hollow = fresh.status is Status.ELIMINATED
            ends += _error_bar(axis, fresh, y - 0.13, color, marker, hollow)
        labels = [
            wording.shorten(run.origin(e.mask), 40) + (" · chosen" if e.mask == run.best else "")
            for e in finalists
        ]
        axis.set_yticks(range(len(finalists)), labels)
        axis.set_ylim(-0.6, len(finalists) - 0.4)
        name, unit = wording.loss_name(run.objective), wording.loss_unit(run.objective)
        axis.set_xlabel(f"loss, {unit} ({name}), with standard error")
        if ends:
            loss_axis(axis, "x", min(ends), max(ends))
        handles = [
            Line2D(
                [],
                [],
                linestyle="",
                marker="o",
                color=GREY,
                markerfacecolor="none",
                label="on search data",
            ),
            Line2D([], [], linestyle="", marker="o", color="#aa3377", label="on fresh data"),
            Line2D([], [], linestyle="", marker="s", color=ACCENT, label="on fresh data, baseline"),
            Line2D([], [], linestyle="", marker="o", color=INK, label="on fresh data, chosen"),
        ]
        if any(e.status is Status.ELIMINATED for e in finalists):
            handles.append(_handle("on part of the fresh data", "#aa3377", "o"))
            handles[-1].set_markerfacecolor("none")
        if run.score != run.objective:
            del handles[0]
        figure.legend(handles=handles, loc="outside lower center", ncol=min(len(handles), 4))
        return picture(
            figure, f"Losses of {len(finalists)} finalists on search data and on fresh data."
        )


def dropped_picture(run: RunData) -> Picture:
    """How often each sublayer is dropped among the best masks."""
    elite = run.elite()
    sites = run.space.sites
    columns = _columns(sites)
    kinds = [k for k in KINDS if any(s.kind == k and s.index in run.space.free for s in sites)]
    with canvas(9.6, 1.15 * len(kinds) + 0.85) as figure:
        axes = figure.subplots(len(kinds), 1, squeeze=False, sharex=True)[:, 0]
        for axis, kind in zip(axes, kinds, strict=True):
            for site in (s for s in sites if s.kind == kind):
                part = 100 * sum(not p.mask.keep[site.index] for p in elite) / len(elite)
                gone = run.best is not None and not run.best.keep[site.index]
                axis.bar(
                    columns[site.stack, site.block] + 0.5,
                    part,
                    width=0.8,
                    color=DROPPED if gone else "#9fb3c8",
                )
            axis.set_ylim(0, 105)
            axis.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
            axis.grid(False, axis="x")
            axis.set_title(
                wording.KIND_NAMES[kind],
                loc="left",
                fontsize=9.5,
                weight="bold",
                pad=3,
            )
        axes[-1].set_xlim(-0.2, max(columns.values()) + 1.2)
        _block_ticks(axes[-1], columns)
        handles = [
            Patch(facecolor=DROPPED, label="also dropped in the best mask"),
            Patch(facecolor="#9fb3c8", label="kept in the best mask"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncol=2)
        return picture(figure, f"Share of the best {len(elite)} masks that drop each sublayer.")


def overfit_picture(overfit: Mapping[str, Any]) -> Picture:
    """Losses of the repaired mask against the size of its fit text, and as cut, by text."""
    rows = overfit["rows"]
    cut, fits = rows[0], rows[1:]
    sizes = [row["fit_tokens"] for row in fits]
    texts = {
        "fit": ("the text it is fitted on", GREY, "s"),
        "heldout": ("held-out text", ACCENT, "o"),
        "other": (f"another text ({overfit['other']})", INK, "D"),
    }
    with canvas(9.6, 3.6) as figure:
        for axis, kind, label in zip(
            figure.subplots(1, 2),
            ("kl", "excess"),
            ("KL divergence to the dense model, nats", "excess cross-entropy, nats"),
            strict=True,
        ):
            for name, (title, color, marker) in texts.items():
                if name not in fits[0]:
                    continue
                axis.plot(
                    sizes,
                    [row[name][kind] for row in fits],
                    color=color,
                    marker=marker,
                    markersize=5,
                    label=title,
                )
                if name in cut:
                    axis.axhline(cut[name][kind], color=color, linestyle=":", linewidth=1.2)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [wording.amount(size) for size in sizes])
            axis.minorticks_off()
            if kind == "kl":
                axis.set_ylim(bottom=0)
            else:
                # A model may predict a text better than the dense one.
                axis.axhline(0, color=GREY, linewidth=1)
            axis.set_xlabel("tokens the repair is fitted on")
            axis.set_ylabel(label)
        handles, titles = axis.get_legend_handles_labels()
        handles.append(Line2D([], [], color=GREY, linestyle=":"))
        figure.legend(handles, [*titles, "as cut"], loc="outside lower center", ncol=4)
        said = "; ".join(
            f"{size:,} tokens: {row['heldout']['kl']:.4f}"
            for size, row in zip(sizes, fits, strict=True)
        )
        return picture(
            figure,
            f"Held-out KL by size of the fit text. As cut: {cut['heldout']['kl']:.4f}; {said}.",
        )


def running_best(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    """The corners of the best-so-far curve of (cost, loss) pairs."""
    line: list[tuple[float, float]] = []
    for cost, loss in sorted((c, v) for c, v in points if v is not None):
        if not line or loss < line[-1][1]:
            if line and line[-1][0] == cost:
                line.pop()
            line.append((cost, loss))
    return line


def _error_bar(
    axis: Axes, evaluation: Evaluation, y: float, color: str, marker: str, hollow: bool = False
) -> list[float]:
    """Draw loss and standard error, and return the ends of the bar."""
    loss, error = evaluation.loss or 0.0, evaluation.stderr or 0.0
    axis.errorbar(
        [loss],
        [y],
        xerr=[error],
        color=color,
        marker=marker,
        markersize=5,
        linewidth=1.2,
        capsize=2,
        markerfacecolor="white" if hollow else color,
    )
    return [loss - error, loss + error]


def _handle(label: str, color: str, marker: str) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, markersize=5, color=color, label=label)


def _columns(sites: Sequence[Site]) -> dict[tuple[str, int], int]:
    """The column of each block, with a gap of one column between stacks."""
    found: dict[tuple[str, int], int] = {}
    last, column = "", -1
    for site in sites:
        if (site.stack, site.block) not in found:
            column += 2 if last and site.stack != last else 1
            found[site.stack, site.block] = column
            last = site.stack
    return found


def _block_ticks(axis: Axes, columns: dict[tuple[str, int], int]) -> None:
    """Block numbers below the last strip, and the names of the stacks where there are several."""
    stacks = list(dict.fromkeys(stack for stack, _ in columns))
    blocks = max(block for _, block in columns) + 1
    every = max(1, int(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]).tick_values(0, blocks)[1]))
    marks = {x + 0.5: str(block) for (_, block), x in columns.items() if block % every == 0}
    axis.set_xticks(list(marks), list(marks.values()))
    axis.set_xlabel("block" if len(stacks) == 1 else f"block of {', then '.join(stacks)}")
