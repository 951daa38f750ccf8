"""The front over pairs of budgets: quality against the first cost, one line a cap of the second."""

from __future__ import annotations

from dataclasses import dataclass

from depthsearch.config import FrontConfig
from depthsearch.report import wording
from depthsearch.report.data import FrontEntry, RunData
from depthsearch.report.drawing import ACCENT, CYCLE, MANY_DOTS, Picture, canvas, loss_axis, picture
from depthsearch.report.front import staircase
from depthsearch.run.front import front_grid
from depthsearch.space import Evaluation, Limit, Status


@dataclass(frozen=True)
class Line:
    """The answers under one cap of the second cost, None for those without one."""

    second: Limit | None
    entries: tuple[FrontEntry, ...]

    def holds(self, evaluation: Evaluation) -> bool:
        """Whether a mask does not exceed the cap."""
        return self.second is None or self.second.cost(evaluation.mask) <= self.second.cap


def has_pairs(run: RunData) -> bool:
    """Whether some budgets of the run are of two costs."""
    return any(len(entry.space.limits) > 1 for entry in run.front)


def pair_lines(run: RunData) -> list[Line]:
    """The budgets by their cap of the second cost, the loosest first."""
    found: dict[int | None, list[FrontEntry]] = {}
    seconds: dict[int | None, Limit] = {}
    for entry in run.front:
        second = entry.space.limits[1] if len(entry.space.limits) > 1 else None
        cap = None if second is None else second.cap
        found.setdefault(cap, []).append(entry)
        if second is not None:
            seconds[cap] = second
    order = sorted(found, key=lambda cap: (cap is not None, -(cap or 0)))
    return [Line(seconds.get(cap), tuple(found[cap])) for cap in order]


def pairs_picture(run: RunData) -> Picture | None:
    """Search loss against the first cost, a line for each cap of the second; None without a loss.

    A line is the lowest loss of any mask within its cap at each first cost or below.
    """
    known = [p.evaluation for p in run.by_mask.values() if p.evaluation.status is Status.OK]
    lines = pair_lines(run)
    if not known:
        return None
    first = run.space.limits[0]
    metric = next(line.second.metric for line in lines if line.second is not None)
    said: list[str] = []
    labels: dict[tuple[float, float], list[int]] = {}

    def place(evaluation: Evaluation) -> tuple[float, float]:
        return 100 * first.cost(evaluation.mask) / (first.dense or 1), evaluation.loss or 0.0

    with canvas(9.6, 4.6) as figure:
        axis = figure.subplots()
        dots = [place(e) for e in known]
        axis.plot(
            [x for x, _ in dots],
            [y for _, y in dots],
            linestyle="",
            marker="o",
            markersize=2.5,
            markeredgewidth=0,
            color="#c4cad1",
            rasterized=len(known) > MANY_DOTS,
            label="evaluated mask",
        )
        for number, line in enumerate(lines):
            color, marker = ((ACCENT, "o"), *CYCLE)[number % (1 + len(CYCLE))]
            label = f"any {wording.metric_name(metric, inside=True)}"
            if line.second is not None:
                share = 100 * line.second.cap / (line.second.dense or 1)
                label = f"{wording.metric_name(metric)} at most {share:.3g} %"
            corners = staircase([place(e) for e in known if line.holds(e)])
            # The lowest loss so far also holds at every higher cost.
            corners += [(100.0, corners[-1][1])] if corners else []
            axis.plot(
                [x for x, _ in corners],
                [y for _, y in corners],
                drawstyle="steps-post",
                color=color,
                linewidth=1.2,
                label=label,
            )
            for entry in line.entries:
                if entry.best is None:
                    continue
                x, y = place(entry.best.evaluation)
                axis.plot([x], [y], marker=marker, markersize=6.5, color=color, zorder=3)
                labels.setdefault((x, y), []).append(entry.number)
                loss = f"{wording.loss(y)} {wording.loss_unit(run.score)}"
                said.append(f"{entry.number}: {entry.space.budget.text}, {loss}")
        for spot, numbers in labels.items():
            axis.annotate(
                ", ".join(map(str, sorted(numbers))),
                spot,
                textcoords="offset points",
                xytext=(6, 5),
                weight="bold",
            )
        axis.set_xlabel(f"{wording.metric_name(first.metric)}, % of the dense model's")
        axis.set_ylabel(f"search loss, {wording.loss_unit(run.score)}\n({run.score})")
        answers = [e.best.evaluation.loss or 0.0 for e in run.front if e.best is not None]
        losses = [e.loss or 0.0 for e in known]
        # What lies far above the answers would squeeze them flat.
        highest = min(max(losses), 2 * max(answers, default=0.0)) or max(losses)
        loss_axis(axis, "y", min(losses), highest)
        figure.legend(loc="outside lower center", ncol=3)
        words = f"Search loss of {len(known)} masks against {wording.metric_name(first.metric)}"
        return picture(
            figure, f"{words}, a line for each cap of the other cost. {'; '.join(said)}."
        )


def left_out(run: RunData) -> tuple[str, ...]:
    """The pairs of budgets that no mask of the space meets, in words."""
    front = run.config.get("front")
    if not has_pairs(run) or not isinstance(front, dict):
        return ()
    grid = front_grid(run.space, FrontConfig.model_validate(front))
    return tuple(budget.text for budget in grid.left_out)
