"""The regression: it learns what it should, and its algebra agrees with plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from landscapes import Landscape, toy, two_stacks

from depthsearch.searchers.regression import (
    MaskFeatures,
    MaskRegression,
    Observations,
    negative_log_likelihood,
    observe,
)
from depthsearch.space import Budget, Evaluation, Mask, SearchSpace, Status


def random_masks(space: SearchSpace, count: int, seed: int) -> tuple[Mask, ...]:
    rng = np.random.default_rng(seed)
    genes = len(space.genes)
    return tuple(
        dict.fromkeys(space.decode(rng.random(genes).tolist()) for _ in range(count)).keys()
    )


def r_squared(truth: np.ndarray, guess: np.ndarray) -> float:
    return 1 - float(((truth - guess) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_recovers_a_linear_and_pairwise_function(seed: int) -> None:
    """Held-out R2 of at least 0.9 from 400 masks; nothing in the keys tells the function."""
    space = toy(12)
    rng = np.random.default_rng([seed, 7])
    linear = rng.normal(0.0, 0.1, 24)
    pairs = np.triu(rng.normal(0.0, 0.02, (24, 24)), 1)

    def value(mask: Mask) -> float:
        gone = np.array([not kept for kept in mask.keep], dtype=float)
        return float(linear @ gone + gone @ pairs @ gone)

    masks = random_masks(space, 600, seed)
    values = np.array([value(mask) for mask in masks])
    model = MaskRegression(
        MaskFeatures(space, [1.0] * 24), Observations(masks[:400], values[:400], np.zeros(400))
    )
    assert r_squared(values[400:], model.mean(masks[400:])) > 0.9


@pytest.mark.parametrize("scatter", [0.0, 0.6])
def test_gap_figures_of_a_sweep_help(scatter: float) -> None:
    space, landscape = toy(15), Landscape(30, 0, scatter)
    masks = random_masks(space, 360, 0)
    values = np.log([landscape.evaluate(mask).loss or 0.0 for mask in masks])
    seen = Observations(masks[:60], values[:60], np.zeros(60))
    sweep = [landscape.evaluate(space.dense.without([i])).loss or 0.0 for i in range(30)]
    keys = np.array(sweep) - 0.1
    found = [
        r_squared(values[60:], MaskRegression(MaskFeatures(space, k), seen).mean(masks[60:]))
        for k in (keys, np.ones(30))
    ]
    assert found[0] > 0.9
    assert found[0] > found[1] + 0.05


def test_figures_of_a_mask_worked_by_hand() -> None:
    space = toy(3)
    features = MaskFeatures(space, [1.0, 3.0, 4.0, 1.0, -5.0, 1.0])
    mask = Mask.from_key("100101")
    assert features.dropped([mask]).tolist() == [[0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0]]
    # Two gaps, of costs (3, 4) and (0): sum 7, roots 5 + 0, largest 4 + 0; the median cost is 1.
    assert np.exp(features.figures([mask]))[0] - 0.5 == pytest.approx([2, 7, 5, 4])
    assert np.exp(features.figures([Mask.from_key("111110")]))[0] - 0.5 == pytest.approx([1] * 4)
    assert np.exp(features.figures([space.dense]))[0] - 0.5 == pytest.approx([0] * 4)


@pytest.mark.parametrize(
    ("space", "apart", "together"),
    [
        (two_stacks(2, 2), (3, 4), (4, 5)),
        (toy(4, Budget("sites", drop=2), protected=(3, 4)), (2, 5), (1, 2)),
    ],
)
def test_gaps_end_with_their_stack_and_at_what_is_protected(
    space: SearchSpace, apart: tuple[int, int], together: tuple[int, int]
) -> None:
    features = MaskFeatures(space, [1.0] * len(space.genes))
    two, one = (space.dense.without(dropped) for dropped in (apart, together))
    figures = np.exp(features.figures([two, one])) - 0.5
    # Root sums of squares: two gaps of cost 1 each, one gap of two such sites.
    assert figures[0] == pytest.approx([2, 2, 2, 2])
    assert figures[1] == pytest.approx([1, 2, math.sqrt(2), 1])
    # Two genes dropped, and a pair of neighbours only where they are of one gap.
    assert features.dropped([two, one]).sum(axis=1).tolist() == [2, 3]


def test_mean_and_covariance_condition_a_joint_normal() -> None:
    """Against the textbook formulas with an explicit inverse and a kernel written out by pairs."""
    space = toy(4)
    masks = random_masks(space, 40, 3)
    seen, new = masks[:12], masks[12:15]
    features = MaskFeatures(space, np.linspace(0.2, 1.0, 8).tolist())
    values = np.sin(np.arange(12.0))
    variances = np.linspace(0.0, 0.3, 12)
    model = MaskRegression(features, Observations(seen, values, variances))
    shape, scale, center = model.shape, values.std(), values.mean()
    raw = features.figures(seen)

    def kernel(a: Mask, b: Mask) -> float:
        left, right = ((features.figures([m])[0] - raw.mean(0)) / raw.std(0) for m in (a, b))
        apart = np.abs(features.dropped([a]) - features.dropped([b])).sum()
        near = shape.interactions * math.exp(-apart / (shape.length * 8))
        return 1.0 + shape.linear * float(left @ right) + near

    def table(rows: tuple[Mask, ...], columns: tuple[Mask, ...]) -> np.ndarray:
        return np.array([[kernel(a, b) for b in columns] for a in rows])

    noise = np.diag(shape.noise + variances / scale**2)
    gain = table(new, seen) @ np.linalg.inv(table(seen, seen) + noise)
    assert model.mean(new) == pytest.approx(center + scale * (gain @ ((values - center) / scale)))
    expected = scale**2 * (table(new, new) - gain @ table(seen, new))
    assert model.covariance(new) == pytest.approx(expected, abs=1e-9)


def test_likelihood_is_that_of_a_normal_distribution() -> None:
    kernel = np.array([[2.0, 1.0], [1.0, 3.0]])
    targets = np.array([1.0, -1.0])
    # The determinant is 5, the inverse [[3, -1], [-1, 2]] / 5, the quadratic form 7 / 5.
    assert negative_log_likelihood(kernel, targets) == pytest.approx(0.7 + 0.5 * math.log(5))


def test_noisy_observations_are_followed_less() -> None:
    space = toy(6)
    masks = random_masks(space, 200, 0)[:30]
    values = np.array([float(sum(mask.dropped)) for mask in masks])
    values[0] += 40.0
    variances = np.zeros(30)
    exact = MaskRegression(MaskFeatures(space, [1.0] * 12), Observations(masks, values, variances))
    loose = np.where(np.arange(30) == 0, 1e4, 0.0)
    doubted = MaskRegression(MaskFeatures(space, [1.0] * 12), Observations(masks, values, loose))
    truth = values[0] - 40.0
    assert abs(doubted.mean(masks[:1])[0] - truth) < 5 < abs(exact.mean(masks[:1])[0] - truth)


def test_eliminated_masks_are_corrected_by_the_complete_ones() -> None:
    """The first sequence is twice (e, then 1/e times) as hard; only one was seen of the last."""
    masks = [Mask.dropping(8, [i]) for i in range(4)]
    complete = [
        Evaluation(masks[0], (2.0, 2 * math.e - 2.0), 2),
        Evaluation(masks[1], (4.0, 8 * math.e - 4.0), 2),
        Evaluation(masks[2], (6.0, 12 * math.e - 6.0), 2),
    ]
    last = Evaluation(masks[3], (1.0,), 1, Status.ELIMINATED)
    seen = observe([*complete, last])
    shifts = [math.log(math.e / 2), 1.0, 1.0]
    assert seen.values[:3] == pytest.approx([0.0 + 1, math.log(4) + 1, math.log(6) + 1])
    assert seen.values[3] == pytest.approx(float(np.mean(shifts)))
    assert seen.variances == pytest.approx([0.0, 0.0, 0.0, float(np.var(shifts, ddof=1))])
    # Too few to compare with: taken as it is, and hardly believed.
    alone = observe([complete[0], last])
    assert alone.values[1] == pytest.approx(0.0)
    assert alone.variances[1] == 1.0


def test_losses_that_are_not_positive_are_taken_as_they_are() -> None:
    masks = [Mask.dropping(4, [i]) for i in range(2)]
    seen = observe([Evaluation(masks[0], (0.0, 2.0), 2), Evaluation(masks[1], (3.0, 3.0), 2)])
    assert seen.values.tolist() == [1.0, 3.0]
    failed = Evaluation(Mask.dropping(4, [3]), (), 0, Status.FAILED)
    assert len(observe([failed])) == 0


def test_the_most_useful_hold_the_best_and_an_even_choice() -> None:
    masks = tuple(Mask.dropping(40, [i]) for i in range(40))
    values = np.arange(40.0)[::-1].copy()
    seen = Observations(masks, values, np.zeros(40))
    chosen = seen.most_useful(16)
    # By loss: the 12 best, then 4 of the 28 others in equal steps.
    assert sorted(chosen.values) == [*range(12), 12.0, 19.0, 26.0, 33.0]
    assert list(chosen.values) == sorted(chosen.values, reverse=True)
    assert seen.most_useful(40) is seen
