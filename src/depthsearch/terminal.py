"""What people see while they wait: bars on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from depthsearch.errors import DepthsearchError
from depthsearch.run.compare import OnArm
from depthsearch.run.heldout import OnHeldout
from depthsearch.run.loop import OnProgress
from depthsearch.run.loop import Progress as SearchProgress

console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
"""For what is read while one waits."""

results = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
"""For what a command was called for; nothing else goes to standard output."""


@contextmanager
def search_bar(title: str) -> Iterator[OnProgress]:
    """A live bar for a search: share done, time left, cost, evaluations and best loss."""
    with _bar("{task.fields[detail]}") as bar:
        task = bar.add_task(title, total=None, detail="")

        yield _updater(bar, task, title)
        bar.update(task, completed=1.0, total=1.0)


def _updater(bar: Progress, task: TaskID, title: str) -> OnProgress:
    def update(progress: SearchProgress) -> None:
        best = "" if progress.best_loss is None else f", best {progress.best_loss:.4f}"
        # With another total a bar forgets the speed of the search: finals have their own.
        total = None if progress.fraction is None else 1.0 if progress.phase == "search" else 2.0
        share = 1.0 if progress.phase == "done" else min(progress.fraction or 0.0, 0.999)
        bar.update(
            task,
            completed=share * (total or 1.0),
            total=total,
            description=f"{title} · {progress.phase}",
            detail=f"{progress.cost_tokens / 1000:,.0f}k tokens{best}",
        )

    return update


@contextmanager
def stage_bar() -> Iterator[Any]:
    """A live bar for work in named stages: call it with (stage, done, total)."""
    with _bar("") as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield update


@contextmanager
def _bar(detail: str) -> Iterator[Progress]:
    # Few and narrow columns, so that the time left shows on a terminal of 80 characters.
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=10),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        *([TextColumn(detail, markup=False)] if detail else []),
        console=console,
    )
    progress.start()
    stop = progress.stop
    try:
        yield progress
    except DepthsearchError:
        # The one line that says what is wrong stands alone: no bar, and no line break after it.
        progress.live.transient = True
        stop = progress.live.stop
        raise
    finally:
        stop()


@contextmanager
def arm_bars() -> Iterator[tuple[OnArm, OnHeldout]]:
    """One live bar for each run of a comparison and one for its held-out figures."""
    with _bar("{task.fields[detail]}") as bar:

        def start(arm: str, seed: int, done: int, runs: int) -> OnProgress:
            title = f"{done + 1}/{runs} {arm} seed {seed}"
            task = bar.add_task(title, total=None, detail="")
            return _updater(bar, task, title)

        tasks: list[TaskID] = []

        def heldout(done: int, batches: int) -> None:
            if not tasks:
                tasks.append(bar.add_task("held-out figures", total=batches, detail=""))
            bar.update(tasks[0], completed=done)

        yield start, heldout
