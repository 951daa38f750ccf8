"""Refitting weights: the algebra of each operator, and what targets share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import tiny_model
from torch import Tensor

from depthsearch.model.anatomy import describe
from depthsearch.model.operators import (
    OPERATORS,
    RIDGES,
    Normal,
    Operator,
    low_rank,
    solved,
    token_weights,
)
from depthsearch.model.repair import Patch, Projection, projection_of

TOKENS = 400
REFIT = OPERATORS["refit"]


def problem(family: str, noise: float = 0.0, seed: int = 0) -> tuple[Any, ...]:
    """A projection, its inputs, and what the stream lacks: a change of the weight, and noise."""
    model = tiny_model(family)
    anatomy = describe(model)
    projection = projection_of(model, anatomy, anatomy.sites[3])
    rng = torch.Generator().manual_seed(seed)
    out, wide = projection.weight.shape
    inputs = torch.randn(2, TOKENS, wide, generator=rng)
    change = torch.randn(out, wide, generator=rng)
    x = torch.stack([projection.regressors(z)[:, :wide] for z in inputs])
    lacking = x @ (change * projection.gains.float().unsqueeze(1)).T
    lacking += noise * torch.randn(2, TOKENS, out, generator=rng)
    return projection, inputs, lacking, change


def normals(projection: Projection, inputs: Tensor, lacking: Any) -> tuple[Normal, Normal]:
    """Those of the fit and of what is held back; `lacking` is target 5's, or one a target."""
    by_target = lacking if isinstance(lacking, dict) else {5: lacking}
    pair = Normal(projection, list(by_target)), Normal(projection, list(by_target))
    for place, part in enumerate(pair):
        lacks = {target: lack[place] for target, lack in by_target.items()}
        part.add(inputs[place], lacks, torch.ones(TOKENS))
    return pair


def patch_of(
    projection: Projection, inputs: Tensor, lacking: Tensor, operator: Operator = REFIT
) -> Patch | None:
    return solved(projection, *normals(projection, inputs, lacking), operator).patches[5]


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere", "gemma2", "gemma3_text", "olmo2"])
def test_a_change_that_is_there_is_found(family: str) -> None:
    projection, inputs, lacking, change = problem(family)
    patch = patch_of(projection, inputs, lacking)
    assert patch is not None
    assert (patch.site, patch.ridge) == (3, RIDGES[0])
    assert patch.weight.shape == projection.weight.shape
    found = patch.weight - projection.weight
    # Behind a norm every channel is held back a little.
    assert (found - change).norm() < (0.05 if projection.norm is None else 0.15) * change.norm()
    assert patch.left is not None
    assert patch.left < 0.03
    assert (patch.bias is None) == (projection.bias is None)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_noise_asks_for_a_stronger_ridge_and_pure_noise_for_none(family: str) -> None:
    projection, inputs, lacking, _ = problem(family, noise=20.0)
    patch = patch_of(projection, inputs, lacking)
    assert patch is not None
    assert patch.ridge is not None
    assert patch.left is not None
    assert patch.ridge > RIDGES[0]
    assert patch.left > 0.5
    noise = torch.randn(lacking.shape, generator=torch.Generator().manual_seed(1))
    fits = solved(projection, *normals(projection, inputs, noise), REFIT)
    assert fits.patches == {5: None}
    assert fits.ill_conditioned == frozenset()


@pytest.mark.parametrize("operator", ["refit", "channel"])
def test_a_ridge_in_the_end_leaves_the_old_weight(operator: str) -> None:
    projection, inputs, lacking, _ = problem("llama")
    fit, _ = normals(projection, inputs, lacking)
    prepare = OPERATORS[operator].prepare
    solves = [prepare(fit.gram, projection.stacked, ridge) for ridge in (1e3, 1e9)]
    changes = [solve(fit.cross[5]) for solve in solves if solve is not None]
    assert float(changes[1].norm()) < 1e-4 * float(changes[0].norm())


def test_a_bias_is_refitted_with_the_weight() -> None:
    projection, inputs, _, _ = problem("gpt2")
    lacking = torch.full((2, TOKENS, projection.weight.shape[0]), 3.0)
    patch = patch_of(projection, inputs, lacking)
    assert patch is not None
    assert patch.bias is not None
    assert projection.bias is not None
    assert float((patch.bias - projection.bias - 3).abs().max()) < 0.3


@pytest.mark.parametrize("operator", ["map", "channel", "low_rank"])
def test_smaller_operators_find_what_they_can_express(operator: str) -> None:
    projection, inputs, _, _ = problem("llama")
    out, wide = projection.weight.shape
    rng = torch.Generator().manual_seed(2)
    changes = {
        "map": torch.randn(out, out, generator=rng) @ projection.weight,
        "channel": torch.randn(out, 1, generator=rng) * projection.weight,
        "low_rank": torch.randn(out, 3, generator=rng) @ torch.randn(3, wide, generator=rng),
    }
    chosen = low_rank(3) if operator == "low_rank" else OPERATORS[operator]
    patch = patch_of(projection, inputs, inputs @ changes[operator].T, chosen)
    assert patch is not None
    assert patch.left is not None
    assert patch.left < 0.05


class TestLowRank:
    def test_the_change_has_no_higher_rank(self) -> None:
        projection, inputs, lacking, _ = problem("gpt2")
        patch = patch_of(projection, inputs, lacking, low_rank(5))
        assert patch is not None
        assert patch.bias is not None
        changes = [patch.weight - projection.weight, (patch.bias - projection.bias)[:, None]]
        assert int(torch.linalg.matrix_rank(torch.cat(changes, 1), rtol=1e-3)) == 5

    def test_it_is_the_best_of_that_rank(self) -> None:
        """The penalised error, which it minimises, grows in every direction of that rank."""
        projection, inputs, lacking, _ = problem("llama", noise=3.0)
        fit, _ = normals(projection, inputs, lacking)
        ridge = 0.3
        solve = low_rank(2).prepare(fit.gram, projection.stacked, ridge)
        assert solve is not None
        best = solve(fit.cross[5])
        strength = ridge * fit.gram.diagonal().mean()

        def penalised(change: Tensor) -> float:
            error = fit.energy[5] * fit.left(5, change)
            return float(error + strength * change.square().sum())

        u, s, v = torch.linalg.svd(best, full_matrices=False)
        left, right = u[:, :2] * s[:2], v[:2]
        rng = torch.Generator().manual_seed(3)
        for _ in range(20):
            turned = [t + 1e-3 * torch.randn(t.shape, generator=rng) for t in (left, right)]
            assert penalised(turned[0] @ turned[1]) > penalised(best)
        u, s, v = torch.linalg.svd(REFIT.prepare(fit.gram, best, ridge)(fit.cross[5]))  # type: ignore[misc]
        assert penalised((u[:, :2] * s[:2]) @ v[:2]) > penalised(best)

    def test_few_tokens_are_better_spent_on_few_directions(self) -> None:
        projection, inputs, _, _ = problem("llama")
        out, wide = projection.weight.shape
        rng = torch.Generator().manual_seed(4)
        change = torch.randn(out, 2, generator=rng) @ torch.randn(2, wide, generator=rng)
        lacking = inputs @ change.T + 40 * torch.randn(2, TOKENS, out, generator=rng)
        whole, low = (
            patch_of(projection, inputs, lacking, operator) for operator in (REFIT, low_rank(2))
        )
        assert low is not None
        assert low.left is not None
        assert low.left < (1.0 if whole is None or whole.left is None else whole.left) - 0.02

    def test_a_target_that_is_not_finite_is_left_alone(self) -> None:
        projection, inputs, lacking, _ = problem("llama")
        many = {5: lacking, 6: lacking * float("inf")}
        fits = solved(projection, *normals(projection, inputs, many), low_rank(4))
        assert fits.patches[5] is not None
        assert fits.patches[6] is None

    def test_a_rank_that_is_no_limit_is_the_whole_refit(self) -> None:
        projection, inputs, lacking, _ = problem("llama")
        whole, capped = (
            patch_of(projection, inputs, lacking, operator) for operator in (REFIT, low_rank(999))
        )
        assert whole is not None
        assert capped is not None
        assert torch.equal(whole.weight, capped.weight)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_targets_are_fitted_as_if_alone(family: str, operator: str) -> None:
    chosen = low_rank(4) if operator == "low_rank" else OPERATORS[operator]
    projection, inputs, first, _ = problem(family)
    many = {4: first, 5: problem(family, 20.0)[2], 7: first * 0, 8: -first}
    together = solved(projection, *normals(projection, inputs, many), chosen)
    for target, lack in many.items():
        alone = solved(projection, *normals(projection, inputs, {target: lack}), chosen)
        expected, found = alone.patches[target], together.patches[target]
        assert (expected is None) == (found is None)
        assert found is None or target != 7
        assert found is not None or target == 7 or operator != "refit"
        if expected is not None and found is not None:
            assert torch.equal(expected.weight, found.weight)
            assert (expected.ridge, expected.left) == (found.ridge, found.left)


def test_what_targets_share_is_prepared_once_a_ridge() -> None:
    projection, inputs, first, _ = problem("llama")
    noisy = problem("llama", noise=20.0)[2]
    seen: list[float] = []

    def prepare(gram: Tensor, weight: Tensor, ridge: float) -> Any:
        seen.append(ridge)
        return REFIT.prepare(gram, weight, ridge)

    lacking = {4: first, 5: first * 2, 6: noisy}
    fits = solved(projection, *normals(projection, inputs, lacking), Operator(prepare, REFIT.flops))
    chosen = {patch.ridge for patch in fits.patches.values() if patch is not None}
    assert len(chosen) == 2
    assert seen == [*RIDGES, *sorted(ridge for ridge in chosen if ridge is not None)]


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_ill_conditioned_fit_leaves_the_weight_alone_and_says_so(
    family: str, bad: float
) -> None:
    projection, inputs, lacking, _ = problem(family)
    fit, held = normals(projection, inputs, {5: lacking, 6: lacking})
    fit.gram *= bad
    fits = solved(projection, fit, held, REFIT)
    assert fits.patches == {5: None, 6: None}
    assert fits.ill_conditioned == {5, 6}


def test_weights_make_errors_relative() -> None:
    dense = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]])
    weights = token_weights(dense)
    assert float(weights[0] / weights[1]) == pytest.approx(1e4)
    assert bool(weights.isfinite().all())
