"""Who is ahead in a comparison: over budgets, over cost, and whether search losses carry over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from depthsearch.report import wording
from depthsearch.report.drawing import Picture, arm_names, arm_style, canvas, loss_axis, picture
from depthsearch.report.tables import Table


def course_picture(compare: Mapping[str, Any]) -> Picture | None:
    """Held-out KL of the best mask so far against search cost, with intervals over seeds."""
    courses = [course for course in compare.get("anytime") or () if course["points"]]
    if not courses:
        return None
    names = arm_names(compare["arms"])
    lows, highs = [], []
    end = max(course["points"][-1]["cost_tokens"] for course in courses)
    with canvas(9.6, 4.0) as figure:
        axis = figure.add_subplot()
        for course in courses:
            color, marker = arm_style(names, str(course["arm"]))
            points = course["points"]
            costs = [float(point["cost_tokens"]) for point in points]
            means, low, high = (
                [float(point[f"heldout_kl_{what}"]) for point in points]
                for what in ("mean", "low", "high")
            )
            axis.fill_between(costs, low, high, step="post", color=color, alpha=0.14, linewidth=0)
            axis.plot(costs, means, drawstyle="steps-post", color=color, linewidth=1.6)
            axis.plot(costs, means, linestyle="", marker=marker, markersize=4.5, color=color)
            # The interval at the very end, which a step has no width for.
            axis.plot([costs[-1]] * 2, [low[-1], high[-1]], color=color, linewidth=1.2, alpha=0.6)
            lows += low
            highs += high
        axis.set_xscale("log")
        axis.set_xlim(right=end * 1.06)
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: wording.amount(value)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("search cost (dense-equivalent tokens)")
        axis.set_ylabel("held-out KL of the best mask so far, nats")
        loss_axis(axis, "y", min(lows), max(highs))
        shown = [str(course["arm"]) for course in courses]
        figure.legend(handles=_handles(names, shown, line=True), loc="outside right upper")
        said = "; ".join(
            f"{course['arm']} ends at {course['points'][-1]['heldout_kl_mean']:.4f}"
            for course in courses
        )
        return picture(figure, f"Held-out KL of the best mask so far against cost: {said}.")


def budgets_picture(parts: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Held-out KL of each arm at each budget, with intervals."""
    known = [part for part in parts if part["summary"]]
    if len(known) < 2:
        return None
    names = arm_names([arm for part in known for arm in part["arms"]])
    lows, highs = [], []
    with canvas(9.6, 4.0) as figure:
        axis = figure.add_subplot()
        for place, part in enumerate(known):
            rows = {str(row["arm"]): row for row in part["summary"]}
            for slot, name in enumerate(names):
                if name not in rows:
                    continue
                color, marker = arm_style(names, name)
                mean, low, high = (
                    float(rows[name][f"heldout_kl_{what}"]) for what in ("mean", "low", "high")
                )
                x = place + 0.6 * ((slot + 0.5) / len(names) - 0.5)
                axis.plot([x, x], [low, high], color=color, linewidth=1.6)
                axis.plot([x], [mean], linestyle="", marker=marker, markersize=6, color=color)
                lows.append(low)
                highs.append(high)
        labels = [wording.folded(str(part["budget_text"]), 30) for part in known]
        axis.set_xticks(range(len(known)), labels)
        axis.set_xlim(-0.5, len(known) - 0.5)
        axis.grid(False, axis="x")
        axis.set_ylabel("held-out KL, nats (95 % interval)")
        loss_axis(axis, "y", min(lows), max(highs))
        figure.legend(handles=_handles(names, names, line=False), loc="outside right upper")
        return picture(figure, f"Held-out KL of {', '.join(names)} at {len(known)} budgets.")


def ranks_table(compare: Mapping[str, Any]) -> Table:
    """Mean ranks with intervals, and in how many resamples each arm is first; best first."""
    return Table(
        ("Arm", "Mean rank", "95 % interval", "First in so many resamples"),
        tuple(
            (
                str(row["arm"]),
                f"{row['rank_mean']:.2f}",
                f"{row['rank_low']:.2f} to {row['rank_high']:.2f}",
                f"{100 * row['first_share']:.0f} %",
            )
            for row in compare.get("ranks") or ()
        ),
    )


def carry_table(compare: Mapping[str, Any]) -> Table:
    """The gap between search loss and held-out loss of each arm, smallest held-out loss first."""
    known = [row for row in compare.get("summary") or () if row.get("gap_mean") is not None]
    return Table(
        ("Arm", "Loss on search data", "Held-out loss", "Gap", "95 % interval"),
        tuple(
            (
                str(row["arm"]),
                wording.loss(row["select_loss_mean"]),
                wording.loss(row["select_loss_mean"] + row["gap_mean"]),
                wording.signed(row["gap_mean"]),
                f"{wording.signed(row['gap_low'])} to {wording.signed(row['gap_high'])}",
            )
            for row in sorted(known, key=lambda row: float(row["heldout_kl_mean"]))
        ),
    )


def _handles(names: Sequence[str], shown: Sequence[str], line: bool) -> list[Line2D]:
    handles = []
    for name in shown:
        color, marker = arm_style(names, name)
        handles.append(
            Line2D(
                [],
                [],
                color=color,
                marker=marker,
                markersize=5,
                linestyle="-" if line else "",
                label=wording.shorten(name, 26),
            )
        )
    return handles
