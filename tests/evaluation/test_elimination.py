from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest

from depthsearch.evaluation.elimination import MIN_SEQUENCES, Elimination, claims
from depthsearch.evaluation.student import critical_value

N, STEP = 32, 4
LOOKS = tuple(range(STEP, N, STEP))


def race(
    losses: np.ndarray, survivors: int, error_rate: float, rivals: np.ndarray | None = None
) -> dict[int, int]:
    """The candidates `[candidate, sequence]` that a race loses: after how many sequences."""
    known = np.empty((0, N)) if rivals is None else rivals
    contest = Elimination(len(losses), known.tolist(), survivors, LOOKS, N, error_rate)
    out: dict[int, int] = {}
    for seen in LOOKS:
        active = {i: losses[i, :seen].tolist() for i in range(len(losses)) if i not in out}
        if not active:
            break
        out |= dict.fromkeys(contest.losers(active), seen)
    return out


def naive(losses: np.ndarray, survivors: int, error_rate: float) -> dict[int, int]:
    """The same, judged at each look as if it were the only one, and against one mask only."""
    out: dict[int, int] = {}
    for seen in LOOKS:
        active = [i for i in range(len(losses)) if i not in out]
        if len(active) <= survivors:
            break
        bar = losses[sorted(active, key=lambda i: losses[i, :seen].mean())[survivors - 1], :seen]
        for i in active:
            d = losses[i, :seen] - bar
            error = d.std(ddof=1) / math.sqrt(seen)
            if d.mean() > critical_value(error_rate, seen - 1) * error:
                out[i] = seen
    return out


def equal(rng: np.random.Generator) -> np.ndarray:
    """Twelve masks that differ from sequence to sequence but not on the whole text."""
    return rng.normal(size=(12, N))


def heavy(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_t(3, size=(12, N))


def shared(rng: np.random.Generator) -> np.ndarray:
    """Hard sequences are hard for all, and masks differ there most."""
    return rng.lognormal(0, 0.5, N) * (1 + 0.1 * rng.normal(size=(12, N)))


def clustered(rng: np.random.Generator) -> np.ndarray:
    """Four sequences of a document are alike, but they don't stand side by side."""
    documents = np.repeat(rng.normal(size=(12, N // 4)), 4, axis=1)
    return (documents + 0.2 * rng.normal(size=(12, N)))[:, rng.permutation(N)]


def nearly_equal(rng: np.random.Generator) -> np.ndarray:
    """The means of the whole text are a hundredth of the noise apart."""
    return rng.normal(size=(12, N)) + 0.01 * rng.permutation(12)[:, None]


Population = Callable[[np.random.Generator], np.ndarray]


@pytest.mark.parametrize("survivors", [1, 4])
@pytest.mark.parametrize("population", [equal, heavy, shared, clustered, nearly_equal])
def test_the_error_rate_holds_over_the_whole_race(population: Population, survivors: int) -> None:
    """And would not if every look and every mask were judged as the only one."""
    rate, races, lost, lost_naively = 0.1, 300, 0, 0
    rng = np.random.default_rng(survivors)
    for _ in range(races):
        losses = population(rng)
        if population is not nearly_equal:
            losses -= losses.mean(axis=1, keepdims=True)
            kept = set(range(survivors))
        else:
            kept = set(np.argsort(losses.mean(axis=1))[:survivors].tolist())
        lost += bool(kept & set(race(losses, survivors, rate)))
        lost_naively += bool(kept & set(naive(losses, survivors, rate)))
    assert lost <= rate * races + 2 * math.sqrt(rate * (1 - rate) * races)
    assert lost_naively > 2 * rate * races


def test_what_is_clearly_worse_falls() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        losses = rng.normal(size=(12, N)) + 3.0 * np.arange(12)[:, None]
        out = race(losses, 2, 0.05)
        assert not {0, 1} & set(out)
        assert set(out) >= set(range(4, 12))


class TestByHand:
    """Differences 1, 2, 3, 2: mean 2, t = 2 / sqrt(2/3 (1/4 - 1/8)) = 6.93, 3 degrees of freedom.

    The t distribution has 5.84 at 0.005 and 7.45 at 0.0025.
    """

    pair = ((0.0, 0.0, 0.0, 0.0), (1.0, 2.0, 3.0, 2.0))

    def losers(self, error_rate: float, looks: Sequence[int] = (4,), **changes: int) -> list[int]:
        settings = {"candidates": 2, "survivors": 1, "total": 8, **changes}
        contest = Elimination(rivals=(), looks=looks, error_rate=error_rate, **settings)
        return contest.losers(dict(enumerate(self.pair)))

    def test_one_look_at_two_masks_is_one_test(self) -> None:
        assert self.losers(0.005) == [1]
        assert self.losers(0.0025) == []

    def test_looks_share_the_error_rate(self) -> None:
        """4 and 6 sequences get shares of 0.6 and 0.4."""
        assert self.losers(0.0025 / 0.6, looks=(4, 6)) == []
        assert self.losers(0.0050 / 0.6, looks=(4, 6)) == [1]

    def test_looks_that_can_eliminate_nobody_take_no_share(self) -> None:
        assert self.losers(0.005, looks=(1, 2, 3, 4, 7)) == [1]

    def test_masks_share_it(self) -> None:
        """Three masks with one place: the best must not fall by the claim of two others."""
        assert self.losers(0.005, candidates=3) == []
        assert self.losers(0.010, candidates=3) == [1]

    def test_a_longer_text_leaves_more_open(self) -> None:
        """t = 2 / sqrt(2/3 / 4 * (1 - 4/N)) falls from 6.93 to 5.66 for 4 of 8 and 4 of 16."""
        assert self.losers(0.005, total=16) == []
        assert self.losers(0.010, total=16) == [1]

    def test_little_left_is_as_uncertain_as_little_seen(self) -> None:
        """With two sequences to come there is one degree of freedom: t = 8.49, 31.8 at 0.01."""
        assert self.losers(0.010, total=6) == []
        assert self.losers(0.050, total=6) == [1]


def test_a_rival_is_compared_on_what_was_seen() -> None:
    """What it lost later is not held against a candidate, nor for it."""
    seen, later = [1.0, 2.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]
    for rest in (0.0, 100.0):
        contest = Elimination(1, [[*later, *([rest] * 4)]], 1, (4,), 8, 0.005)
        assert contest.losers({0: seen}) == [0]


def test_nobody_falls_for_being_worse_than_what_failed() -> None:
    """Two places: each of the others is worse than the first two, of which one then fails."""
    base = np.random.default_rng(0).normal(size=N)
    losses = np.array([base, base + 1, base + 5 + 0.1 * np.arange(N) % 1, base + 6])
    contest = Elimination(4, [], 2, LOOKS, N, 0.05)
    seen = LOOKS[0]
    assert set(contest.losers({i: losses[i, :seen].tolist() for i in (0, 2)})) == set()
    contest.forget(0)
    left = {i: losses[i, : LOOKS[1]].tolist() for i in (1, 2)}
    assert contest.losers(left) == []


def test_claims_of_earlier_looks_are_kept() -> None:
    """Worse than one mask at first and than the other later: together they take both places."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1e-3, (2, 16))
    candidate = np.full(16, 1.0)
    second[:4] += [0.0, 5.0, -5.0, 3.0]
    first[4:8] += [90.0, -90.0, 70.0, -70.0]
    contest = Elimination(1, [first.tolist(), second.tolist()], 2, (4, 8), 16, 0.1)
    assert contest.losers({0: candidate[:4].tolist()}) == []
    late = Elimination(1, [first.tolist(), second.tolist()], 2, (4, 8), 16, 0.1)
    second[:4] = 0.0
    kept = Elimination(1, [first.tolist(), second.tolist()], 2, (4, 8), 16, 0.1)
    assert late.losers({0: candidate[:8].tolist()}) == []
    assert kept.losers({0: candidate[:4].tolist()}) == [0]


class TestNobodyFalls:
    far = np.stack([np.zeros(N), np.full(N, 100.0)])

    @pytest.mark.parametrize("seen", [1, MIN_SEQUENCES - 1, N - 1, N])
    def test_before_enough_was_seen_or_after_all_was(self, seen: int) -> None:
        contest = Elimination(2, [], 1, range(1, N), N, 0.5)
        assert contest.losers({0: [0.0] * seen, 1: [100.0] * seen}) == []

    def test_where_there_are_places_for_all(self) -> None:
        assert race(self.far, 2, 0.5) == {}
        assert race(self.far, 1, 0.5) == {1: MIN_SEQUENCES}
        assert race(self.far[1:], 2, 0.5, rivals=self.far[:1]) == {}
        assert race(self.far[1:], 1, 0.5, rivals=self.far[:1]) == {0: MIN_SEQUENCES}

    def test_of_masks_that_do_the_same(self) -> None:
        assert race(np.zeros((5, N)), 1, 0.5) == {}

    def test_in_an_empty_race(self) -> None:
        assert Elimination(0, [], 1, LOOKS, N, 0.05).losers({}) == []


@pytest.mark.parametrize(("masks", "candidates", "survivors"), [(6, 6, 1), (6, 4, 2), (7, 2, 4)])
def test_claims_are_those_of_the_worst_places(masks: int, candidates: int, survivors: int) -> None:
    """By brute force over the places, of the best `survivors`, that candidates may hold."""
    held = min(candidates, survivors)
    worst = max(
        sum((masks - j) / (survivors - j + 1) for j in places)
        for places in combinations(range(1, survivors + 1), held)
    )
    assert claims(masks, candidates, survivors) == pytest.approx(worst)
