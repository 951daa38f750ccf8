from __future__ import annotations

from depthsearch.evaluation.progress import Load, Progress


def test_what_is_left_of_begun_work_falls_with_the_time_it_takes() -> None:
    progress = Progress(300.0)
    first, second = Load(1, 100, since=0.0), Load(1, 60, since=2.0)
    progress.change(Load(), first)
    progress.change(Load(), second)
    assert progress.busy == 2
    assert progress.left(5.0) == 160

    progress.finished(50, 5.0)
    assert progress.left(5.0) == 160 - 10 * (5 + 3)
    assert progress.left(500.0) == 0

    progress.change(first, Load())
    assert progress.busy == 1
    assert progress.left(5.0) == 60 - 10 * 3
