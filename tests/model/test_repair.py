"""Refitting projections: the algebra, and the model that stays as it was."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import tiny_model

from depthsearch.errors import UnsupportedModelError
from depthsearch.model.anatomy import describe
from depthsearch.model.repair import (
    OPERATORS,
    RIDGES,
    Normal,
    Patch,
    patched,
    projection_of,
    solved,
    token_weights,
)

TOKENS = 400


def problem(family: str, noise: float = 0.0, seed: int = 0):
    """A projection, its inputs, and what the stream lacks: a change of the weight, and noise."""
    model = tiny_model(family)
    anatomy = describe(model)
    projection = projection_of(model, anatomy, anatomy.sites[3])
    rng = torch.Generator().manual_seed(seed)
    out, wide = projection.weight.shape
    inputs = torch.randn(2, TOKENS, wide, generator=rng)
    change = torch.randn(out, wide, generator=rng)
    lacking = inputs @ change.T + noise * torch.randn(2, TOKENS, out, generator=rng)
    return projection, inputs, lacking, change


def normals(projection, inputs, lacking) -> tuple[Normal, Normal]:
    pair = Normal(projection, [5]), Normal(projection, [5])
    for part, z, lack in zip(pair, inputs, lacking, strict=True):
        part.add(z, {5: lack}, torch.ones(TOKENS))
    return pair


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere"])
def test_a_change_that_is_there_is_found(family: str) -> None:
    projection, inputs, lacking, change = problem(family)
    patch = solved(projection, *normals(projection, inputs, lacking), 5, OPERATORS["refit"])
    assert patch is not None
    assert (patch.site, patch.ridge) == (3, RIDGES[0])
    found = patch.weight - projection.weight
    assert (found - change).norm() < 0.05 * change.norm()
    assert patch.left < 0.03
    assert (patch.bias is None) == (projection.bias is None)


def test_noise_asks_for_a_stronger_ridge_and_pure_noise_for_none() -> None:
    projection, inputs, lacking, _ = problem("llama", noise=20.0)
    patch = solved(projection, *normals(projection, inputs, lacking), 5, OPERATORS["refit"])
    assert patch is not None
    assert patch.ridge > RIDGES[0]
    assert patch.left > 0.5
    noise = torch.randn(lacking.shape, generator=torch.Generator().manual_seed(1))
    assert solved(projection, *normals(projection, inputs, noise), 5, OPERATORS["refit"]) is None


def test_a_ridge_in_the_end_leaves_the_old_weight() -> None:
    projection, inputs, lacking, _ = problem("llama")
    fit, _ = normals(projection, inputs, lacking)
    changes = [OPERATORS["refit"](fit, 5, projection.weight.double().T, r) for r in (1e3, 1e9)]
    assert changes[0] is not None
    assert changes[1] is not None
    assert float(changes[1].norm()) < 1e-4 * float(changes[0].norm())


def test_a_bias_is_refitted_with_the_weight() -> None:
    projection, inputs, _, _ = problem("gpt2")
    lacking = torch.full((2, TOKENS, projection.weight.shape[0]), 3.0)
    patch = solved(projection, *normals(projection, inputs, lacking), 5, OPERATORS["refit"])
    assert patch is not None
    assert patch.bias is not None
    assert projection.bias is not None
    assert float((patch.bias - projection.bias - 3).abs().max()) < 0.3


@pytest.mark.parametrize("operator", ["map", "channel"])
def test_smaller_operators_find_what_they_can_express(operator: str) -> None:
    projection, inputs, _, _ = problem("llama")
    out = projection.weight.shape[0]
    rng = torch.Generator().manual_seed(2)
    factor = (
        torch.randn(out, out, generator=rng)
        if operator == "map"
        else torch.diag(torch.randn(out, generator=rng))
    )
    lacking = inputs @ (factor @ projection.weight).T
    patch = solved(projection, *normals(projection, inputs, lacking), 5, OPERATORS[operator])
    assert patch is not None
    assert patch.left < 0.05


def test_an_ill_conditioned_fit_leaves_the_weight_alone() -> None:
    projection, inputs, lacking, _ = problem("llama")
    fit, held = normals(projection, inputs * 0, lacking)
    assert solved(projection, fit, held, 5, OPERATORS["refit"]) is None


def test_weights_make_errors_relative() -> None:
    dense = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]])
    weights = token_weights(dense)
    assert float(weights[0] / weights[1]) == pytest.approx(1e4)
    assert bool(weights.isfinite().all())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_patched_restores_the_model_also_on_an_error(family: str) -> None:
    model = tiny_model(family)
    anatomy = describe(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    projection = projection_of(model, anatomy, anatomy.sites[2])
    bias = None if projection.bias is None else projection.bias + 1
    patch = Patch(2, projection.weight * 2, bias, 0.1, 0.5)

    def fail_inside() -> None:
        with patched(model, anatomy, [patch]):
            assert torch.equal(projection.weight, patch.weight)
            assert projection.bias is None or torch.equal(projection.bias, bias)
            changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
            assert len(changed) == 1 + (bias is not None)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_a_norm_behind_the_sublayer_is_refused(family: str) -> None:
    model = tiny_model(family)
    anatomy = describe(model)
    with pytest.raises(UnsupportedModelError, match="norm behind each sublayer"):
        projection_of(model, anatomy, anatomy.sites[0])
