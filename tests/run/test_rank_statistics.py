from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthsearch.run.rank_statistics import (
    SizeFigures,
    above_lowest,
    agreement,
    correlations,
    resampled,
    rival,
    settled,
    size_figures,
    smallest_possible,
    smallest_sufficient,
    winner,
)


def brute_tau_b(a, b):
    """Tau-b by its definition: concordant less discordant pairs over the untied ones."""
    net = untied_a = untied_b = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        x, y = a[i] - a[j], b[i] - b[j]
        net += int(x * y > 0) - int(x * y < 0)
        untied_a += x != 0
        untied_b += y != 0
    return net / math.sqrt(untied_a * untied_b)


def brute_rho(a, b):
    """Rho by its definition: Pearson's correlation of ranks, ties at the mean of their places."""

    def ranks(x):
        order = sorted(x)
        return [np.mean([i for i, y in enumerate(order) if y == v]) for v in x]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def test_correlations_of_a_case_worked_by_hand() -> None:
    """Of six pairs one is tied in a, one in b; four are concordant, none discordant: 4 / 5."""
    tau, rho = correlations([1, 2, 2, 3], [1, 2, 3, 3])
    assert tau == pytest.approx(4 / 5)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3.5, 3.5: products 3.75, squares 4.5 and 4.5.
    assert rho == pytest.approx(3.75 / 4.5)
    assert correlations([1, 2, 3], [3, 2, 1]) == pytest.approx((-1, -1))
    # One neighbouring swap among four: 5 pairs agree and 1 does not; 1 - 6 * 2 / (4 * 15).
    assert correlations([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx((4 / 6, 0.8))
    assert correlations([1, 1, 1], [1, 2, 3]) is None


small = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12)


@given(pairs=small)
def test_correlations_are_their_definitions(pairs) -> None:
    a, b = zip(*pairs, strict=True)
    found = correlations(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found is None
    else:
        assert found == pytest.approx((brute_tau_b(a, b), brute_rho(a, b)))


def test_the_interval_holds_the_figure_of_quiet_text_and_widens_with_noise() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(8.0)[:, None]
    quiet = truth + 0.01 * rng.standard_normal((8, 40))
    loud = truth + 8 * rng.standard_normal((8, 40))
    still = agreement(quiet, quiet, rng)
    assert still is not None
    assert (still.kendall.low, still.kendall.mean, still.kendall.high) == (1, 1, 1)
    noisy = agreement(quiet, loud, rng)
    assert noisy is not None
    assert noisy.kendall.low < noisy.kendall.mean < 1
    assert noisy.kendall.high - noisy.kendall.low > 0.2
    assert noisy.kendall.mean == pytest.approx(brute_tau_b(quiet.mean(1), loud.mean(1)))
    assert agreement(np.ones((3, 5)), quiet[:3], rng) is None


def test_resampled_means_have_the_spread_of_a_mean_of_so_many_windows() -> None:
    rng = np.random.default_rng(1)
    table = rng.standard_normal((2, 50))
    drawn = resampled(table, rng, 20_000, 10)
    assert drawn.shape == (20_000, 2)
    assert drawn.mean(axis=0) == pytest.approx(table.mean(axis=1), abs=0.01)
    assert drawn.std(axis=0) == pytest.approx(table.std(axis=1) / math.sqrt(10), rel=0.03)


def test_shares_of_wins_are_those_of_a_case_worked_by_hand() -> None:
    """Of two windows each mask wins one: mask 0 by 3, mask 1 by 1. With one window it is a coin.

    With two, mask 1 wins only where its window comes twice: a quarter of the draws.
    """
    pool = np.array([[0.0, 1.0], [3.0, 0.0]])
    heldout = np.array([[1.0, 2.0], [2.0, 5.0]])
    one, two = (size_figures(pool, heldout, n, np.random.default_rng(2), 20_000) for n in (1, 2))
    assert one.shares == pytest.approx([0.5, 0.5], abs=0.015)
    assert two.shares == pytest.approx([0.75, 0.25], abs=0.015)
    # Mask 1 is worse by 1 and by 3 on the two held-out windows: 2 in the mean, 5 in the square.
    share = two.shares[1]
    assert two.regret == pytest.approx(2 * share)
    assert two.regret_stderr == pytest.approx(math.sqrt(5 * share - 4 * share**2))
    assert two.favourite == 0
    # Held-out text ranks 0 before 1: tau is 1 where 0 wins and -1 where 1 wins.
    assert two.kendall == pytest.approx(1 - 2 * two.shares[1])


def figures(shares, heldout, windows=1):
    table = np.array(heldout, dtype=float)
    return SizeFigures(windows, np.array(shares), table - table[winner(table.mean(axis=1))], 0.5)


def test_the_error_of_a_regret_is_that_of_windows_which_draw_their_winners() -> None:
    """A simulation: each held-out window gets the winner of its own text."""
    rng = np.random.default_rng(4)
    heldout = rng.standard_normal((3, 200)) + np.array([[0.0], [0.4], [0.8]])
    size = figures([0.7, 0.2, 0.1], heldout)
    drawn = rng.choice(3, size=(20_000, 200), p=size.shares)
    means = [size.excess[row, rng.integers(0, 200, 200)].mean() for row in drawn]
    assert size.regret == pytest.approx(np.mean(means), abs=0.003)
    assert size.regret_stderr == pytest.approx(np.std(means), rel=0.03)


def test_a_rival_is_told_on_the_other_half_of_the_windows() -> None:
    """Mask 0 is best on the first half, mask 1 on the second: each is measured on the other."""
    losses = np.array([[1.0, 1.0, 4.0, 5.0], [2.0, 3.0, 2.0, 2.0]])
    assert rival(losses).tolist() == [2.0, 3.0, 4.0, 5.0]
    assert rival(losses[:, :1]).tolist() == [1.0]


def test_equal_masks_have_no_regret() -> None:
    """The best of them on held-out text is ahead by luck alone."""
    regrets = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pool, heldout = (0.3 * rng.standard_normal((24, n)) for n in (64, 64))
        regrets.append(size_figures(pool, heldout, 32, rng, 200).regret)
    # Against the best on the same windows it is about 0.07 each time.
    assert abs(np.mean(regrets)) < 3 * np.std(regrets) / math.sqrt(40)
    assert np.std(regrets) < 0.06


def test_sizes_are_compared_window_by_window() -> None:
    """Mask 1 is worse by 2 ± 0.1, mask 0 and 1 alike by 50 on every other window.

    The shares differ by a half and the regrets by 1; Student's t of 59 degrees is 2.001.
    """
    worse = np.tile([1.9, 2.1], 30)
    excess = np.array([[0.0] * 60, worse]) + np.repeat([0.0, 50.0], 30)
    half, none = (SizeFigures(1, np.array([1 - p, p]), excess, 0.5) for p in (0.5, 0.0))
    first, second = above_lowest([half, none])
    assert (second.mean, second.low, second.high) == (0, 0, 0)
    assert first.mean == pytest.approx(1)
    error = 0.05 * math.sqrt(60 / 59) / math.sqrt(60)
    assert first.high - first.mean == pytest.approx(2.001 * error, rel=1e-3)
    assert first.mean - first.low == pytest.approx(2.001 * error, rel=1e-3)


def test_the_smallest_sufficient_size_loses_next_to_nothing_as_do_all_larger() -> None:
    """Mask 1 is worse by 0, 2 and 4, 20 windows each; the median loses 1, and 0.1 is negligible.

    With a share p the regret is 2p, between about 1.57p and 2.43p: 0.31 at least for a fifth, and
    0.024 at most for a hundredth.
    """
    heldout = [[1.0] * 60, [1.0, 3.0, 5.0] * 20]
    sizes = [figures([1 - p, p], heldout, n) for n, p in enumerate((0.5, 0.2, 0.01, 0.0), start=1)]
    assert smallest_sufficient(sizes) == smallest_possible(sizes) == 2
    # A larger size that is worse again: the smaller one before it does not count.
    sizes = [figures([1 - p, p], heldout, n) for n, p in enumerate((0.0, 0.4, 0.0), start=1)]
    assert smallest_sufficient(sizes) == smallest_possible(sizes) == 2
    assert smallest_sufficient([figures([0.0, 1.0], heldout)]) == 0
    # Masks that all lose the same: there is nothing to lose.
    same = [figures([1 - p, p], [[1.0] * 4] * 2) for p in (0.5, 0.1)]
    assert smallest_sufficient(same) == smallest_possible(same) == 0


def test_little_held_out_text_decides_nothing_rather_than_that_any_size_is_enough() -> None:
    few = [[1, 1, 1], [1, 3, 5]]
    sizes = [figures([1 - p, p], few) for p in (0.5, 0.2, 0.0)]
    assert (smallest_possible(sizes), smallest_sufficient(sizes)) == (0, 2)


def test_scarcer_held_out_text_recommends_no_less_text() -> None:
    """As the masks of a search lie: 24 within 0.3 nats, told apart by 128 windows at most."""

    def place(windows: int, seed: int) -> int:
        rng = np.random.default_rng(seed)
        quality = np.sort(rng.uniform(0, 0.3, 24))[:, None]
        pool, heldout = (quality + 0.3 * rng.standard_normal((24, n)) for n in (128, windows))
        return smallest_sufficient(
            [size_figures(pool, heldout, 2**size, rng, 200) for size in range(8)]
        )

    scarce, plenty = (np.mean([place(n, seed) for seed in range(6)]) for n in (4, 512))
    assert scarce >= plenty >= 3


def test_the_winner_is_settled_where_one_mask_wins_at_every_larger_size() -> None:
    heldout = [[1, 1], [1, 3]]

    def place(*shares: float) -> int | None:
        return settled([figures([share, 1 - share], heldout) for share in shares])

    assert place(0.5, 0.8, 0.92, 0.99) == 2
    assert place(0.95, 0.8, 0.92) == 2
    assert place(0.95, 0.97) == 0
    assert place(0.95, 0.6) is None
    # Another mask wins at first, however clearly.
    assert place(0.02, 0.95) == 1
