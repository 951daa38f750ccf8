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

    hook = projection.module.register_forward_hook(after)
    model(input_ids=torch.arange(20).unsqueeze(0))
    hook.remove()
    z, values = projection.regressors(seen[0]), projection.stacked.float()
    if projection.is_norm:
        values = values + projection.offset
    assert projection.is_norm == anatomy.stack.row.norm_after
    assert projection.shape == tuple(projection.stacked.shape)
    torch.testing.assert_close(z * values if projection.is_norm else z @ values, written[0])


@pytest.mark.parametrize(("family", "offset"), [("gemma2", 1.0), ("olmo2", 0.0), ("llama", 0.0)])
def test_what_a_norm_adds_to_its_weight_is_found(family: str, offset: float) -> None:
    assert projection_at(family)[0].offset == offset


@pytest.mark.parametrize("family", NORM_AFTER)
def test_the_norm_behind_the_sublayer_is_refitted_and_no_other(family: str) -> None:
    model = tiny_model(family)
    block = describe(model).block_list(model)[1]
    assert projection_of(model, describe(model), describe(model).sites[2]).module is (
        block.post_attention_layernorm
    )
    assert projection_of(model, describe(model), describe(model).sites[3]).module is (
        block.post_feedforward_layernorm
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_patch_of_the_weight_itself_is_that_weight(family: str) -> None:
    projection, _ = projection_at(family)
    patch = projection.patch(projection.stacked, 0.1, 0.5)
    assert torch.equal(patch.weight, projection.weight)
    assert (patch.bias is None) == (projection.bias is None)
    assert patch.bias is None or torch.equal(patch.bias, projection.bias)
    assert (patch.site, patch.ridge, patch.left) == (2, 0.1, 0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_patched_restores_the_model_also_on_an_error(family: str) -> None:
    projection, model = projection_at(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bias = None if projection.bias is None else projection.bias + 1
    patch = Patch(2, projection.weight * 2, bias, 0.1, 0.5)

    def fail_inside() -> None:
        with patched(model, describe(model), [patch]):
            assert torch.equal(projection.weight, patch.weight)
            assert projection.bias is None or torch.equal(projection.bias, bias)
            changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
            assert len(changed) == 1 + (bias is not None)
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
    with pytest.raises(UnsupportedModelError, match=rf"'{path}' .* no {shape}.*repair to none"):
        projection_of(model, anatomy, anatomy.sites[2])
