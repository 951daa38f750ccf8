"""Bootstrap intervals: coverage, pairing, reproducibility, refusals."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from depthsearch.errors import DataError
from depthsearch.run.statistics import bootstrap_interval, paired_difference


def crossed(
    rng: np.random.Generator, seeds: int, windows: int, seed_sd: float, window_sd: float
) -> npt.NDArray[np.float64]:
    """Losses around 1.0 whose windows are shared by all seeds."""
    by_seed = seed_sd * rng.normal(size=(seeds, 1))
    by_window = window_sd * rng.normal(size=(1, windows))
    return 1.0 + by_seed + by_window + 0.05 * rng.normal(size=(seeds, windows))


@pytest.mark.parametrize(
    ("seeds", "windows", "seed_sd", "window_sd"),
    [(1, 60, 0.0, 0.3), (3, 60, 0.0, 0.3), (30, 40, 0.2, 0.3)],
)
def test_an_interval_covers_the_truth_about_as_often_as_it_says(
    seeds: int, windows: int, seed_sd: float, window_sd: float
) -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        interval = bootstrap_interval(
            crossed(rng, seeds, windows, seed_sd, window_sd), rng, resamples=400
        )
        assert interval.low <= interval.mean <= interval.high
        inside += interval.low <= 1.0 <= interval.high
    assert 0.89 <= inside / 300 <= 0.99


def test_shared_windows_are_not_counted_as_fresh_text_of_each_seed() -> None:
    rng = np.random.default_rng(1)
    row = crossed(rng, 1, 50, 0.0, 0.3)
    one = bootstrap_interval(row, np.random.default_rng(2))
    five = bootstrap_interval(np.repeat(row, 5, axis=0), np.random.default_rng(2))
    assert five.high - five.low == pytest.approx(one.high - one.low, rel=0.1)


def test_the_level_widens_the_interval() -> None:
    values = crossed(np.random.default_rng(3), 3, 30, 0.1, 0.3)
    narrow = bootstrap_interval(values, np.random.default_rng(4), level=0.5)
    wide = bootstrap_interval(values, np.random.default_rng(4), level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert wide.mean == narrow.mean == pytest.approx(values.mean())


def test_pairing_takes_out_what_both_arms_share() -> None:
    rng = np.random.default_rng(5)
    base = crossed(rng, 3, 40, 0.1, 0.5)
    better = base - 0.05 + 0.01 * rng.normal(size=base.shape)
    apart = bootstrap_interval(better, np.random.default_rng(6))
    paired = paired_difference(better, base, np.random.default_rng(6))
    assert paired.mean == pytest.approx(-0.05, abs=0.01)
    assert paired.high < 0
    assert paired.side == -1
    assert paired.high - paired.low < 0.1 * (apart.high - apart.low)
    assert paired_difference(base, better, np.random.default_rng(6)).side == 1
    assert paired_difference(base, base, np.random.default_rng(6)).to_json() == {
        "mean": 0.0,
        "low": 0.0,
        "high": 0.0,
    }


def test_one_deterministic_row_pairs_with_every_seed() -> None:
    base = crossed(np.random.default_rng(7), 3, 20, 0.1, 0.3)
    once = base[:1]
    difference = paired_difference(base, once, np.random.default_rng(8))
    assert difference == paired_difference(
        base, np.repeat(once, 3, axis=0), np.random.default_rng(8)
    )


def test_equal_seeds_give_equal_intervals() -> None:
    values = crossed(np.random.default_rng(9), 3, 20, 0.1, 0.3)
    one, other = (bootstrap_interval(values, np.random.default_rng(1)) for _ in range(2))
    assert one == other
    assert bootstrap_interval(values, np.random.default_rng(2)) != one


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], r"expected losses as \[seeds, windows\]: got an array of shape \(2,\)"),
        ([[]], r"shape \(1, 0\)"),
        ([[1.0, np.nan]], "not finite"),
    ],
)
def test_what_is_no_table_of_losses_is_refused(values: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bootstrap_interval(values, np.random.default_rng(0))  # type: ignore[arg-type]


def test_arms_that_cannot_be_paired_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="losses of 3 and 4 windows can't be paired"):
        paired_difference(np.ones((2, 3)), np.ones((2, 4)), rng)
    with pytest.raises(DataError, match="arms with 2 and 3 seeds can't be paired"):
        paired_difference(np.ones((2, 3)), np.ones((3, 3)), rng)
    with pytest.raises(DataError, match=r"lies in \(0, 1\): got 95"):
        bootstrap_interval(np.ones((2, 3)), rng, level=95)
    with pytest.raises(DataError, match="at least 1 resample: got 0"):
        bootstrap_interval(np.ones((2, 3)), rng, resamples=0)
