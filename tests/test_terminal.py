from __future__ import annotations

import pytest
from rich.progress import Progress as Bar

from depthsearch.run.loop import Progress
from depthsearch.terminal import _updater


def progress(phase: str, fraction: float | None) -> Progress:
    return Progress(phase, fraction, 1000.0, 10, 1.5)


def test_the_time_left_in_the_finals_is_told_by_their_own_speed() -> None:
    """A search of 100 s, half done after 50; finals of four seconds."""
    now = [0.0]
    bar = Bar(get_time=lambda: now[0], disable=True)
    task = bar.add_task("search", total=None, detail="")
    update = _updater(bar, task, "first")
    for second in range(0, 51, 10):
        now[0] = float(second)
        update(progress("search", second / 100))
    assert bar.tasks[0].time_remaining == pytest.approx(50, abs=1)
    for quarter in range(1, 4):
        now[0] += 1
        update(progress("finals", quarter / 4))
    assert bar.tasks[0].percentage == pytest.approx(75)
    assert bar.tasks[0].time_remaining == pytest.approx(1, abs=0.5)
    update(progress("done", 1.0))
    assert bar.tasks[0].finished
    assert bar.tasks[0].description == "first · done"


def test_without_a_share_the_bar_names_no_time() -> None:
    bar = Bar(disable=True)
    task = bar.add_task("search", total=None, detail="")
    update = _updater(bar, task, "first")
    for _ in range(3):
        update(progress("search", None))
    assert bar.tasks[0].time_remaining is None
    assert not bar.tasks[0].finished
    assert "best 1.5000" in bar.tasks[0].fields["detail"]
    update(progress("done", 1.0))
    assert bar.tasks[0].finished
