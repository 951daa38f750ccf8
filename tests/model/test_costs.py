from __future__ import annotations

import pytest
import torch
from tests.tiny_models import MODEL_TYPES, SEQUENTIAL_TYPES, keeping, tiny_ids, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from depthsearch.errors import ModelError
from depthsearch.model.anatomy import describe
from depthsearch.model.costs import cost_table, head_flops
from depthsearch.space import Mask


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_parameters_and_bytes_sum_to_the_model(model_type: str) -> None:
    model = tiny_model(model_type, dtype=torch.bfloat16)

    table = cost_table(model, describe(model))

    assert table.total("params") == model.num_parameters()
    assert table.total("bytes") == 2 * model.num_parameters()
    assert table.cost("params", Mask.dense(8)) == model.num_parameters()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_without_two_blocks_costs_what_a_smaller_model_has(model_type: str) -> None:
    table_of = tiny_model(model_type)
    smaller = tiny_model(model_type, blocks=2)

    table = cost_table(table_of, describe(table_of))

    assert table.cost("params", keeping("11 00 11 00")) == smaller.num_parameters()
    assert table.cost("bytes", keeping("11 00 11 00")) == 4 * smaller.num_parameters()


def test_a_parallel_blocks_norm_is_paid_while_either_sublayer_stays() -> None:
    model = tiny_model("cohere", blocks=2)
    table = cost_table(model, describe(model))
    cost = {key: table.cost("params", keeping(key)) for key in ("1111", "0111", "1011", "0011")}

    separate = (cost["1111"] - cost["0111"]) + (cost["1111"] - cost["1011"])
    assert cost["1111"] - cost["0011"] == separate + 64


@pytest.mark.parametrize("model_type", SEQUENTIAL_TYPES)
def test_flops_are_what_one_decoded_token_takes(model_type: str) -> None:
    context = 24
    model = tiny_model(model_type, attn_implementation="eager", **_no_window(model_type, context))
    ids = tiny_ids(rows=1, tokens=context)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)

    table = cost_table(model, describe(model), context_tokens=context)

    assert table.total("flops") == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert head_flops(model) == 2 * 64 * 300


@pytest.mark.parametrize("model_type", SEQUENTIAL_TYPES)
def test_kv_bytes_are_what_the_cache_holds(model_type: str) -> None:
    context = 24
    model = tiny_model(model_type, dtype=torch.bfloat16, **_no_window(model_type, context))
    with torch.no_grad():
        cache = model(input_ids=tiny_ids(rows=1, tokens=context), use_cache=True).past_key_values
    held = [2 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers]

    costs = cost_table(model, describe(model), context_tokens=context).of("kv_bytes")

    assert [context * cost for cost in costs.sites[::2]] == held
    assert set(costs.sites[1::2]) == {0}


def test_a_sliding_window_bounds_attention_and_cache() -> None:
    model = tiny_model("gemma3_text")
    table = cost_table(model, describe(model), context_tokens=64)
    sliding, full = (table.of("kv_bytes").sites[i] for i in (0, 2))

    assert model.config.layer_types[:2] == ["sliding_attention", "full_attention"]
    assert sliding * 64 == full * 8
    assert table.of("flops").sites[0] < table.of("flops").sites[2]


def test_a_context_of_no_tokens_is_refused() -> None:
    model = tiny_model("llama", blocks=2)

    with pytest.raises(ModelError, match="at least 1: got 0"):
        cost_table(model, describe(model), context_tokens=0)


def _no_window(model_type: str, context: int) -> dict[str, int]:
    """A window wider than the context, so that every position is attended."""
    return (
        {}
        if "sliding_window" not in tiny_model(model_type).config.to_dict()
        else {"sliding_window": 4 * context}
    )
