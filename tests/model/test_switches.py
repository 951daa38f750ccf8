from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import MODEL_TYPES, keeping, tiny_ids, tiny_model
from torch import Tensor

from depthsearch.errors import MaskError
from depthsearch.model.anatomy import Anatomy, describe
from depthsearch.model.switches import block_view, masked, replaced_blocks, through_view
from depthsearch.space import Mask


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **options).logits


def zeroed(model: Any, anatomy: Anatomy, mask: Mask) -> Any:
    """The model with the output projections of the dropped sublayers set to zero in place."""
    row = anatomy.stack.row
    for index in mask.dropped:
        site = anatomy.sites[index]
        path = (
            f"{row.attention}.{row.attention_out}"
            if site.kind == "attention"
            else f"{row.ffn}.{row.ffn_out}"
        )
        for parameter in anatomy.block_list(model)[site.block].get_submodule(path).parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_masking_equals_zeroed_projections(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    anatomy, ids = describe(model), tiny_ids()
    masks = [Mask.dropping(8, [index]) for index in range(8)] + [keeping("01 10 00 11")]
    found = []
    for mask in masks:
        with masked(model, anatomy, mask):
            found.append(logits(model, ids))

    dense = logits(model, ids)
    for mask, got in zip(masks, found, strict=True):
        reference = zeroed(tiny_model(model_type, dtype=dtype), anatomy, mask)
        assert torch.equal(got, logits(reference, ids)), mask.key
        assert not torch.equal(got, dense), mask.key


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_dropped_block_is_passed_through(model_type: str) -> None:
    model = tiny_model(model_type)
    anatomy, ids = describe(model), tiny_ids()
    with masked(model, anatomy, keeping("11 00 11 11")):
        got = logits(model, ids)
    views = list(anatomy.block_list(model))
    views[1] = through_view(views[1])

    with replaced_blocks(model, anatomy, views):
        assert torch.equal(got, logits(model, ids))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_cached_decoding_equals_uncached_without_the_first_attention(model_type: str) -> None:
    model = tiny_model(model_type)
    anatomy, ids = describe(model), tiny_ids(tokens=20)
    with masked(model, anatomy, keeping("01 11 10 11")), torch.no_grad():
        whole = logits(model, ids)
        pieces, cache = [], None
        for start, stop in ((0, 9), (9, 14), *((i, i + 1) for i in range(14, 20))):
            output = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
            pieces.append(output.logits)
            cache = output.past_key_values

    assert cache.get_seq_length() == 20
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_generation_under_a_mask_is_the_same_with_and_without_a_cache(
    model_type: str,
) -> None:
    model = tiny_model(model_type)
    anatomy, prompt = describe(model), tiny_ids(rows=1, tokens=7)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
    }
    with masked(model, anatomy, keeping("01 10 11 11")):
        cached = model.generate(prompt, **options)
        uncached = model.generate(prompt, use_cache=False, **options)

    assert cached.shape == (1, 19)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_left_padding_changes_nothing_without_the_first_attention(model_type: str) -> None:
    model = tiny_model(model_type)
    anatomy, ids = describe(model), tiny_ids(rows=1, tokens=12)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(17) >= 5).long().unsqueeze(0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with masked(model, anatomy, keeping("01 11 11 11")), torch.no_grad():
        alone = logits(model, ids)[:, -1]
        output = model(
            input_ids=padded[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1]
        )
        last = model(
            input_ids=padded[:, -1:],
            attention_mask=mask,
            position_ids=positions[:, -1:],
            past_key_values=output.past_key_values,
        ).logits[:, -1]

    assert (alone - last).abs().max() < 1e-4


def test_the_model_is_restored_after_an_error() -> None:
    model = tiny_model("gemma2")
    anatomy, ids = describe(model), tiny_ids()
    blocks, before = list(anatomy.block_list(model)), logits(model, ids)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def interrupted() -> None:
        with masked(model, anatomy, keeping("00 10 01 11")):
            assert list(anatomy.block_list(model)) != blocks
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert all(a is b for a, b in zip(anatomy.block_list(model), blocks, strict=True))
    assert torch.equal(logits(model, ids), before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_masks_nest() -> None:
    model = tiny_model("llama")
    anatomy, ids = describe(model), tiny_ids()
    with masked(model, anatomy, keeping("11 01 11 11")):
        outer = logits(model, ids)
        with masked(model, anatomy, keeping("11 11 00 11")):
            pass
        assert torch.equal(outer, logits(model, ids))


def test_a_view_shares_its_weights_and_leaves_the_block_alone() -> None:
    model = tiny_model("gemma3_text")
    anatomy = describe(model)
    block = anatomy.block_list(model)[0]
    children = dict(block.named_children())

    view = block_view(block, anatomy.stack.row, 0, attention=False, ffn=True)

    owned = {id(parameter) for parameter in block.parameters()}
    assert {id(parameter) for parameter in view.parameters()} < owned
    assert dict(block.named_children()) == children
    assert not any(True for _ in view.get_submodule("self_attn").parameters())
    assert block_view(block, anatomy.stack.row, 0, attention=True, ffn=True) is block


def test_a_shared_norm_goes_only_with_both_sublayers() -> None:
    model = tiny_model("cohere")
    anatomy = describe(model)
    block, row = anatomy.block_list(model)[0], anatomy.stack.row

    def norms(attention: bool, ffn: bool) -> int:
        view = block_view(block, row, 0, attention=attention, ffn=ffn)
        return sum(p.numel() for p in view.get_submodule("input_layernorm").parameters())

    assert norms(True, False) == norms(False, True) == 64
    assert norms(False, False) == 0


def test_a_mask_of_another_model_is_refused() -> None:
    model = tiny_model("llama", blocks=2)

    with (
        pytest.raises(MaskError, match="3 sites but the model has 4"),
        masked(model, describe(model), keeping("111")),
    ):
        pass
