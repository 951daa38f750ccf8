"""Draw the curves of arena files: held-out KL of the best mask so far against search cost.

    python benchmarks/courses.py benchmarks/results/smollm2-arena-kv.json ... --out FILE.png

A panel for each budget of each file, means with 95 % intervals. Methods without a search are grey,
one point each: what they end with. Arms go by their names, which are those of their methods where
they don't search. What ends far above the best is left out of a panel.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from depthsearch.report import wording
from depthsearch.report.drawing import GREY, arm_style, canvas, loss_axis
from depthsearch.run.verdict import ONE_PASS

COLUMNS = 2
PANEL = (5.2, 3.2)
TOO_FAR = 2.2
"""Times the lowest loss of a panel: where its axis ends."""
REST = ("o", "s", "D", "P", "X", "v", "*", "h")

Points = Sequence[Mapping[str, float]]


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="of arena.py")
    parser.add_argument("--out", type=Path, required=True, help="a PNG or SVG file")
    chosen = parser.parse_args()
    panels = [
        (f"{model_of(result)}, {budget.replace('_', ' ').replace('=', ' ')}", courses(part))
        for result in (json.loads(path.read_text(encoding="utf-8")) for path in chosen.files)
        for budget, part in result["budgets"].items()
        if part["arms"]
    ]
    names = list(dict.fromkeys(name for _, found in panels for name in found))
    searches = [name for name in names if searched(name)]
    rest = [name for name in names if not searched(name)]
    styles = {name: arm_style(searches, name) for name in searches}
    styles |= {name: (GREY, REST[place % len(REST)]) for place, name in enumerate(rest)}
    rows = -(-len(panels) // COLUMNS)
    with canvas(PANEL[0] * COLUMNS, PANEL[1] * rows + 0.6) as figure:
        for place, (title, found) in enumerate(panels):
            axis = figure.add_subplot(rows, COLUMNS, place + 1)
            axis.set_title(title, fontsize=10)
            draw(axis, found, styles)
        figure.legend(handles=handles(styles), loc="outside lower center", ncols=5)
        figure.savefig(chosen.out)


def model_of(result: Mapping[str, Any]) -> str:
    """The model of a result, without what its file is called beyond the name."""
    return str(result["signature"]["model"]["source"]).partition(".")[0]


def searched(name: str) -> bool:
    """Whether the arm of this name searches."""
    return name.replace(" ", "_") not in ONE_PASS


def courses(part: Mapping[str, Any]) -> dict[str, Points]:
    """The curve of each arm that searches; the end of what does not, or was not measured."""
    curves = {course["arm"]: course["points"] for course in part["anytime"] if course["points"]}
    return {
        row["arm"]: (curves.get(row["arm"]) if searched(row["arm"]) else None)
        or [{**row, "cost_tokens": row["cost_tokens_mean"]}]
        for row in part["arms"]
    }


def draw(axis: Axes, found: Mapping[str, Points], styles: Mapping[str, tuple[str, str]]) -> None:
    """One panel."""
    best = min(points[-1]["heldout_kl_mean"] for points in found.values())
    shown = {name: p for name, p in found.items() if p[-1]["heldout_kl_mean"] <= TOO_FAR * best}
    for name, points in shown.items():
        color, marker = styles[name]
        costs = [point["cost_tokens"] for point in points]
        mean, low, high = (
            [point[f"heldout_kl_{what}"] for point in points] for what in ("mean", "low", "high")
        )
        axis.fill_between(costs, low, high, step="post", color=color, alpha=0.1, linewidth=0)
        axis.plot(costs, mean, drawstyle="steps-post", color=color, marker=marker, markersize=4)
        axis.plot([costs[-1]] * 2, [low[-1], high[-1]], color=color, linewidth=1, alpha=0.6)
    means = [point["heldout_kl_mean"] for points in shown.values() for point in points]
    loss_axis(axis, "y", min(means), min(max(means), TOO_FAR * best))
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: wording.amount(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("search cost (dense-equivalent tokens)")
    axis.set_ylabel("held-out KL, nats")


def handles(styles: Mapping[str, tuple[str, str]]) -> list[Line2D]:
    """One entry for each arm."""
    return [
        Line2D(
            [],
            [],
            color=color,
            marker=marker,
            markersize=5,
            linestyle="-" if searched(name) else "",
            label=name,
        )
        for name, (color, marker) in styles.items()
    ]


if __name__ == "__main__":
    main()
