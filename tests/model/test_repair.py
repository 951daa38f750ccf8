"""What repairs change: which weight of a sublayer, and the model that stays as it was."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import tiny_model

from depthsearch.errors import UnsupportedModelError
from depthsearch.model.anatomy import describe
from depthsearch.model.families import FAMILIES
from depthsearch.model.repair import Patch, Projection, patched, projection_of

NORM_AFTER = [name for name, row in FAMILIES.items() if row.norm_after]


def projection_at(family: str, site: int = 2) -> tuple[Projection, torch.nn.Module]:
    model = tiny_model(family)
    anatomy = describe(model)
    return projection_of(model, anatomy, anatomy.sites[site]), model


@pytest.mark.parametrize("site", [2, 3])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_is_fitted_times_its_regressors_is_what_the_sublayer_writes(
    family: str, site: int
) -> None:
    projection, model = projection_at(family, site)
    anatomy = describe(model)
    seen: list[torch.Tensor] = []
    written: list[torch.Tensor] = []

    def after(_: object, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen.append(args[0].flatten(0, -2))
        written.append(output.flatten(0, -2))

    hooks = [m.register_forward_hook(after) for m in (projection.module, projection.norm) if m]
    model(input_ids=torch.arange(20).unsqueeze(0))
    for hook in hooks:
        hook.remove()
    assert (projection.norm is not None) == anatomy.stack.row.norm_after
    assert projection.shape == tuple(projection.stacked.shape)
    found = projection.regressors(seen[0]) @ (projection.stacked * projection.gains).float()
    torch.testing.assert_close(found, written[-1])


@pytest.mark.parametrize(("family", "offset"), [("gemma2", 1.0), ("olmo2", 0.0), ("llama", 0.0)])
def test_what_a_norm_adds_to_its_weight_is_found(family: str, offset: float) -> None:
    projection, _ = projection_at(family)
    stored = 0.0 if projection.norm is None else projection.norm.weight.double()
    expected = 1.0 if projection.norm is None else stored + offset
    assert torch.equal(projection.gains, torch.ones(64).double() * expected)


@pytest.mark.parametrize("family", NORM_AFTER)
def test_the_norm_is_the_one_behind_the_sublayer(family: str) -> None:
    (attention, model), (ffn, _) = projection_at(family, 2), projection_at(family, 3)
    block = describe(model).block_list(model)[1]
    assert attention.module is block.self_attn.o_proj
    assert attention.norm is block.post_attention_layernorm
    assert ffn.norm is not None
    assert torch.equal(ffn.norm.weight, block.post_feedforward_layernorm.weight)


@pytest.mark.parametrize("family", NORM_AFTER)
def test_channels_that_a_norm_makes_small_are_changed_little(family: str) -> None:
    projection, _ = projection_at(family)
    offset = 0.0 if family == "olmo2" else 1.0
    assert projection.norm is not None
    projection.norm.weight.fill_(1 - offset)
    projection.norm.weight[:3] = torch.tensor([0.0, 1e-3, -1.0]) - offset
    change = torch.ones(projection.shape, dtype=torch.float64)
    reached = projection.reached(change)[0]
    assert reached[0] == 0
    assert reached[1] < 1e-4
    assert 0.9 < float(reached[2]) < 1
    assert float(reached[2]) == pytest.approx(float(reached[5]), rel=1e-3)
    patch = projection.patch(projection.reached(change), torch.eye(len(change)).double(), 0.1, 0.5)
    moved = (patch.weight - projection.weight).abs().amax(1)
    assert moved[0] == 0
    assert moved[1] < 0.1
    assert patch.norm is not None
    assert patch.norm.isfinite().all()


@pytest.mark.parametrize("family", NORM_AFTER)
def test_the_norm_makes_up_for_the_new_size_of_what_it_is_given(family: str) -> None:
    """So a weight twice as large in every entry writes what it should: twice as much."""
    projection, model = projection_at(family)
    z = torch.randn(50, projection.shape[0], generator=torch.Generator().manual_seed(0))
    x = projection.regressors(z).double()
    whole = projection.stacked * projection.gains
    patch = projection.patch(whole, x.T @ x, 0.1, 0.5)
    assert projection.norm is not None
    before = projection.norm(projection.module(z))
    with patched(model, describe(model), [patch]):
        after = projection.norm(projection.module(z))
    torch.testing.assert_close(after, 2 * before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_patch_of_the_weight_itself_is_that_weight(family: str) -> None:
    projection, _ = projection_at(family)
    gram = torch.eye(projection.shape[0], dtype=torch.float64)
    patch = projection.patch(projection.stacked * 0, gram, 0.1, 0.5)
    assert torch.equal(patch.weight, projection.weight)
    assert (patch.norm is None) == (family != "gemma2")
    if projection.norm is not None:
        assert torch.equal(patch.norm, projection.norm.weight)
    assert (patch.bias is None) == (projection.bias is None)
    assert patch.bias is None or torch.equal(patch.bias, projection.bias)
    assert (patch.site, patch.ridge, patch.left) == (2, 0.1, 0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_patched_restores_the_model_also_on_an_error(family: str) -> None:
    projection, model = projection_at(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bias = None if projection.bias is None else projection.bias + 1
    norm = None if projection.norm is None else projection.norm.weight + 1
    patch = Patch(2, projection.weight * 2, bias, 0.1, 0.5, norm)

    def fail_inside() -> None:
        with patched(model, describe(model), [patch]):
            assert torch.equal(projection.weight, patch.weight)
            assert projection.bias is None or torch.equal(projection.bias, bias)
            changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
            assert len(changed) == 1 + (bias is not None) + (norm is not None)
            assert projection.norm is None or torch.equal(projection.norm.weight, norm)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "path", "shape"),
    [("llama", "self_attn.o_proj", "matrix"), ("gemma2", "post_attention_layernorm", "vector")],
)
def test_what_holds_no_such_weight_is_refused(family: str, path: str, shape: str) -> None:
    model = tiny_model(family)
    anatomy = describe(model)
    block = anatomy.block_list(model)[1]
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, torch.nn.Identity())
    expected = rf"'{path}' .* no {shape}.*repair and search.finish to none"
    with pytest.raises(UnsupportedModelError, match=expected):
        projection_of(model, anatomy, anatomy.sites[2])
