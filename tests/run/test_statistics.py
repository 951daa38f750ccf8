"""Bootstrap intervals: coverage, pairing, reproducibility, refusals."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from depthsearch.errors import DataError
from depthsearch.run.statistics import (
    bootstrap_interval,
    midranks,
    paired_difference,
    rank_correlation,
    spearman,
    standings,
)


def crossed(
    rng: np.random.Generator, seeds: int, windows: int, seed_sd: float, window_sd: float
) -> npt.NDArray[np.float64]:
    """Losses around 1.0 whose windows are shared by all seeds."""
    by_seed = seed_sd * rng.normal(size=(seeds, 1))
    by_window = window_sd * rng.normal(size=(1, windows))
    return 1.0 + by_seed + by_window + 0.05 * rng.normal(size=(seeds, windows))


@pytest.mark.parametrize(
    ("seeds", "windows", "seed_sd", "window_sd"),
    [
        (1, 60, 0.0, 0.3),
        (3, 60, 0.0, 0.3),
        (30, 40, 0.2, 0.3),
        (2, 60, 0.3, 0.1),
        (3, 60, 0.3, 0.0),
        (3, 60, 0.1, 0.3),
        (5, 60, 0.3, 0.3),
    ],
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
    assert 0.91 <= inside / 300 <= 0.99


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


class TestTwoLevels:
    """Two seeds and two windows have 2^2 x 2^2 equally likely resamples: all can be listed."""

    TABLE = np.array([[1.0, 2.0], [4.0, 9.0]])

    def listed(self) -> npt.NDArray[np.float64]:
        return np.array(
            [
                self.TABLE[np.ix_(rows, columns)].mean()
                for rows in product(range(2), repeat=2)
                for columns in product(range(2), repeat=2)
            ]
        )

    def test_an_interval_has_the_ends_of_all_resamples_listed_but_for_one_factor(self) -> None:
        found = bootstrap_interval(
            self.TABLE, np.random.default_rng(0), level=0.6, resamples=20_000
        )
        # No end of this level falls on a jump between two of the listed values.
        low, high = np.quantile(self.listed(), [0.2, 0.8], method="inverted_cdf")
        assert found.mean == pytest.approx(4.0)
        below, above = (
            (found.mean - found.low) / (4.0 - low),
            (found.high - found.mean) / (high - 4.0),
        )
        assert below == pytest.approx(above)
        assert above > 1

    def test_both_levels_add_their_variance(self) -> None:
        """For a_i + b_j it is var(a)/n + var(b)/m, with the variances of the samples themselves."""
        a, b = np.array([0.0, 1.0, 5.0]), np.array([0.0, 2.0, 3.0, 11.0])
        table = a[:, None] + b[None, :]
        means = [
            bootstrap_interval(table, np.random.default_rng(seed), level=0.5, resamples=1).low
            for seed in range(4000)
        ]
        assert np.var(means) == pytest.approx(a.var() / 3 + b.var() / 4, rel=0.06)
        # Windows drawn anew inside each seed would leave a third of b's part.
        assert np.var(means) > 1.2 * (a.var() / 3 + b.var() / 12)


class TestRanks:
    def test_equal_values_share_the_mean_of_their_places(self) -> None:
        assert midranks([3.0, 1.0, 3.0, 7.0, 3.0]).tolist() == [3.0, 1.0, 3.0, 5.0, 3.0]
        assert midranks([[2.0, 1.0], [5.0, 5.0]]).tolist() == [[2.0, 1.0], [1.5, 1.5]]

    def test_mean_ranks_over_seeds_and_budgets_by_hand(self) -> None:
        """Ranks: (1, 2, 3) and (2.5, 2.5, 1) at one budget, (3, 1, 2) twice at the other."""
        first = [[[1.0], [5.0]], [[2.0], [5.0]], [[3.0], [4.0]]]
        second = [[[9.0], [8.0]], [[7.0], [1.0]], [[8.0], [2.0]]]
        found = standings([first, second], np.random.default_rng(0), resamples=20_000)
        assert [s.rank.mean for s in found] == [2.375, 1.625, 2.0]
        # Seeds are drawn twice: (0, 0) and (1, 1) in a quarter of the resamples, else (0, 1).
        # At the first budget the mean loss is lowest for a (0, 0: 1 2 3), tied for a and c in
        # (0, 1: 3 3.5 3.5 -> a), and lowest for c (1, 1: 5 5 4); at the second b is always first.
        assert [s.first for s in found] == pytest.approx([0.375, 0.5, 0.125], abs=0.01)
        # a has rank (1 + 3) / 2 with seed 0 twice, (2.5 + 3) / 2 with seed 1 twice; two seeds leave
        # any place open.
        assert (found[0].rank.low, found[0].rank.high) == (1.0, 3.0)

    def test_ranks_over_three_seeds_leave_open_what_student_t_does(self) -> None:
        """The first arm has ranks 1, 1 and 2, so any mean from 1 to 2 when seeds are drawn."""
        by_seed = [[1.0, 1.0, 2.0], [2.0, 2.0, 1.0], [3.0, 3.0, 3.0], [4.0, 4.0, 4.0]]
        table = np.array(by_seed)[:, :, None]
        rank = standings([table], np.random.default_rng(0))[0].rank
        wider = 4.3027 / 1.95996 * math.sqrt(3 / 2)
        assert (rank.low, rank.high) == pytest.approx((1.0, 4 / 3 + wider * 2 / 3), abs=1e-3)

    def test_arms_that_are_equal_share_everything(self) -> None:
        table = np.random.default_rng(1).random((1, 3, 20)).repeat(4, axis=0)
        for standing in standings([table], np.random.default_rng(0)):
            assert standing.rank.to_json() == {"mean": 2.5, "low": 2.5, "high": 2.5}
            assert standing.first == pytest.approx(0.25)

    def test_seeds_widen_the_interval_of_a_rank(self) -> None:
        """Twenty windows leave no doubt here; which seed is drawn does."""
        better, worse = np.full((2, 20), 1.0), np.array([[2.0] * 20, [0.5] * 20])
        for standing in standings([[better, worse]], np.random.default_rng(0)):
            assert (standing.rank.low, standing.rank.high) == (1.0, 2.0)

    @pytest.mark.parametrize(
        ("budgets", "message"),
        [
            ([], "at least one budget"),
            ([np.ones((2, 3))], r"\[arms, seeds, windows\]"),
            ([np.ones((2, 3, 4)), np.ones((2, 2, 4))], "can't be ranked together"),
            ([np.full((2, 3, 4), np.inf)], "not finite"),
        ],
    )
    def test_what_cannot_be_ranked_is_refused(self, budgets: list[Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            standings(budgets, np.random.default_rng(0))


class TestCorrelation:
    def test_spearman_by_hand(self) -> None:
        # 1 - 6 * (1 + 1 + 4 + 0 + 4) / (5 * 24), without ties.
        assert spearman([1, 2, 3, 4, 5], [2, 1, 5, 4, 3]) == pytest.approx(0.5)
        # Ranks 1.5 1.5 3 and 1 3 2: covariance 0 - of (-.5, -.5, 1) with (-1, 1, 0).
        assert spearman([4, 4, 9], [1, 3, 2]) == pytest.approx(0.0)
        assert spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1.0)
        assert spearman([1, 2, 3], [7, 7, 7]) is None

    def test_masks_are_ranked_within_their_text(self) -> None:
        """Each text orders its masks the wrong way round; the harder text has the higher losses."""
        groups = []
        for level in (0.0, 10.0):
            losses = level + np.arange(5.0)
            groups.append((losses, np.repeat((level - np.arange(5.0))[:, None], 6, axis=1)))
        found = rank_correlation(groups, np.random.default_rng(0))
        assert found is not None
        assert found.masks == 10
        assert found.interval.to_json() == {"mean": -1.0, "low": -1.0, "high": -1.0}
        pooled = spearman(*(np.concatenate(part) for part in zip(*(
            (a, b.mean(axis=1)) for a, b in groups), strict=True)))  # fmt: skip
        assert pooled is not None
        assert pooled > 0

    def test_the_interval_covers_the_truth_about_as_often_as_it_says(self) -> None:
        rng, covered, runs = np.random.default_rng(3), 0, 120
        # Of two normal variables with correlation r it is 6 / pi * arcsin(r / 2).
        truth = 6 / np.pi * np.arcsin(0.6 / 2)
        for _ in range(runs):
            a = rng.normal(size=24)
            b = 0.6 * a + 0.8 * rng.normal(size=24)
            found = rank_correlation(
                [(a, np.repeat(b[:, None], 5, axis=1))], rng, level=0.9, resamples=200
            )
            assert found is not None
            covered += found.interval.low <= truth <= found.interval.high
        assert 0.8 <= covered / runs <= 0.97

    def test_too_few_masks_have_none(self) -> None:
        rng = np.random.default_rng(0)
        assert rank_correlation([], rng) is None
        assert rank_correlation([([1.0, 2.0, 3.0], np.eye(3))], rng) is None
        assert rank_correlation([([1.0, 2.0], np.eye(2))] * 4, rng) is None
        assert rank_correlation([([1.0] * 4, np.eye(4))], rng) is None
