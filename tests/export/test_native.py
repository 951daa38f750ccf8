from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.tiny_models import (
    MODEL_TYPES,
    PARALLEL_TYPES,
    SEQUENTIAL_TYPES,
    keeping,
    tiny_config,
    tiny_model,
)

from depthsearch.errors import ExportError, MaskError
from depthsearch.export import NativePlan, plan_native, truncated_config, truncated_state
from depthsearch.model.anatomy import Anatomy, describe


def anatomy(model_type: str = "llama", blocks: int = 4) -> Anatomy:
    return describe(tiny_model(model_type, blocks))


def test_whole_blocks_keep_their_pairs() -> None:
    plan = plan_native(anatomy(), keeping("11 00 11 00"))

    assert plan.pairs == ((0, 0), (2, 2))
    assert not plan.is_dense
    assert plan_native(anatomy(), keeping("11 11 11 11")).is_dense


def test_a_run_that_starts_at_an_ffn_is_paired_anew() -> None:
    assert plan_native(anatomy(), keeping("10 01 11 11")).pairs == ((0, 1), (2, 2), (3, 3))
    assert plan_native(anatomy(), keeping("10 00 00 01")).pairs == ((0, 3),)
    assert plan_native(anatomy(), keeping("00 10 01 11")).pairs == ((1, 2), (3, 3))


@pytest.mark.parametrize(
    ("pattern", "run"),
    [
        ("11 01 11 11", "decoder.1.attention alone"),
        ("11 10 11 10", "decoder.1.ffn alone"),
        ("11 10 00 11", "3 neighbouring sublayers, decoder.1.ffn to decoder.2.ffn, an odd number"),
        ("01 10 11 11", "decoder.0.attention alone"),
    ],
)
def test_a_free_mask_is_refused_with_its_odd_run_and_what_to_do(pattern: str, run: str) -> None:
    with pytest.raises(ExportError) as caught:
        plan_native(anatomy(), keeping(pattern))

    assert run in str(caught.value)
    assert "packable: true" in str(caught.value)
    assert "not available yet" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", PARALLEL_TYPES)
def test_parallel_blocks_go_whole(model_type: str) -> None:
    parallel = anatomy(model_type)

    assert plan_native(parallel, keeping("11 00 11 11")).pairs == ((0, 0), (2, 2), (3, 3))
    with pytest.raises(ExportError, match=r"drops decoder\.1\.ffn alone.*granularity: block"):
        plan_native(parallel, keeping("11 10 01 11"))


def test_nothing_left_and_foreign_masks_are_refused() -> None:
    with pytest.raises(ExportError, match="drops every block"):
        plan_native(anatomy(), keeping("00 00 00 00"))
    with pytest.raises(MaskError, match="6 sites but the model has 8"):
        plan_native(anatomy(), keeping("11 00 11"))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_dense_configuration_is_never_changed(model_type: str) -> None:
    config = tiny_config(model_type)
    before = copy.deepcopy(config.to_dict())

    small = truncated_config(config, NativePlan(((0, 0), (3, 3)), 4))
    small.validate()

    assert small.num_hidden_layers == 2
    assert config.to_dict() == before
    assert type(small) is type(config)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "cohere2", "qwen2", "qwen3"])
def test_layer_types_follow_the_attention(model_type: str) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = tiny_config(model_type, layer_types=kinds)

    small = truncated_config(config, NativePlan(((0, 1), (3, 3)), 4))

    assert small.layer_types == ["full_attention", "full_attention"]
    assert config.layer_types == kinds


def test_every_list_with_an_entry_a_block_is_cut_and_others_are_not() -> None:
    config = tiny_config(
        "llama",
        no_rope_layers=[1, 0, 1, 1],
        attention_windows=(8, 16, 32, 64),
        mlp_layer_types=["dense", "sparse", "dense", "sparse"],
        intermediate_sizes=[10, 20, 30, 40],
        eos_token_id=[1, 2, 3, 4],
        stop_token_ids=[5, 6, 7, 8],
        long_factors=[1.0, 2.0],
    )

    small = truncated_config(config, NativePlan(((0, 1), (3, 3)), 4))

    assert small.no_rope_layers == [1, 1]
    assert small.attention_windows == (8, 64)
    assert small.mlp_layer_types == ["sparse", "sparse"]
    assert small.intermediate_sizes == [20, 40]
    assert small.eos_token_id == [1, 2, 3, 4]
    assert small.stop_token_ids == [5, 6, 7, 8]
    assert small.long_factors == [1.0, 2.0]


def test_thresholds_and_block_numbers_are_counted_anew() -> None:
    config = tiny_config(
        "llama", first_k_dense_replace=2, mlp_only_layers=[1, 2], max_window_layers=3
    )

    small = truncated_config(config, NativePlan(((1, 2), (3, 3)), 4))

    assert small.first_k_dense_replace == 0
    assert small.mlp_only_layers == [0]
    assert small.max_window_layers == 1


def test_the_threshold_still_says_what_the_layer_types_say() -> None:
    config = tiny_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    small = truncated_config(config, NativePlan(((0, 1), (2, 2), (3, 3)), 4))

    rebuilt = tiny_config(
        "qwen2",
        blocks=3,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=small.max_window_layers,
    )

    assert small.layer_types == rebuilt.layer_types
    assert small.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]


def test_a_period_gives_way_to_the_explicit_layer_types() -> None:
    config = tiny_config("gemma3_text", layer_types=None, sliding_window_pattern=2)
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2

    small = truncated_config(config, NativePlan(((0, 0), (2, 2), (3, 3)), 4))

    assert small.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert "sliding_window_pattern" not in small.to_dict()


def test_remote_code_entries_are_left_out() -> None:
    config = tiny_config("llama", auto_map={"AutoConfig": "configuration_x.X"})

    small = truncated_config(config, NativePlan(((0, 0),), 4))

    assert "auto_map" not in small.to_dict()
    assert config.auto_map == {"AutoConfig": "configuration_x.X"}


@pytest.mark.parametrize(
    "setting",
    [
        {"num_kv_shared_layers": 2},
        {"scale_attn_by_inverse_layer_idx": True},
        {"full_attention_layers": [1, 3]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_tie_a_block_to_its_place_are_refused(setting: dict[str, Any]) -> None:
    config = tiny_config("llama", **setting)

    with pytest.raises(ExportError, match=next(iter(setting))):
        truncated_config(config, NativePlan(((0, 0), (2, 2)), 4))
    truncated_config(config, NativePlan(tuple((b, b) for b in range(4)), 4))


@pytest.mark.parametrize("model_type", SEQUENTIAL_TYPES)
def test_each_new_block_takes_attention_and_ffn_with_their_norms(model_type: str) -> None:
    model = tiny_model(model_type)
    parts = describe(model)
    row, path = parts.stack.row, parts.stack.path
    dense = model.state_dict()

    state = truncated_state(model, parts, plan_native(parts, keeping("10 01 00 11")))

    for new, (first, second) in enumerate(((0, 1), (3, 3))):
        for child in (row.attention, *row.attention_norms, row.ffn, *row.ffn_norms):
            source = second if child in (row.ffn, *row.ffn_norms) else first
            inner = [n for n in dense if n.startswith(f"{path}.{source}.{child}.")]
            assert inner
            for name in inner:
                there = name.replace(f"{path}.{source}.", f"{path}.{new}.", 1)
                assert state[there].data_ptr() == dense[name].data_ptr(), there
    assert not any(name.startswith(f"{path}.2.") for name in state)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tied_weights_are_listed_once_and_nothing_is_copied(model_type: str) -> None:
    model = tiny_model(model_type, tie_word_embeddings=True)
    parts = describe(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    state = truncated_state(model, parts, plan_native(parts, keeping("11 00 11 11")))

    assert "lm_head.weight" not in state
    places = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in state.values()} <= places
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_untied_heads_are_kept() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    parts = describe(model)

    assert "lm_head.weight" in truncated_state(
        model, parts, plan_native(parts, keeping("11 00 11 11"))
    )


def test_weights_outside_the_sublayers_forbid_new_pairs_only() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    parts = describe(model)

    state = truncated_state(model, parts, plan_native(parts, keeping("11 00 11 11")))
    assert "model.layers.1.scale" in state
    with pytest.raises(ExportError, match="block 0 holds 'scale' outside"):
        truncated_state(model, parts, plan_native(parts, keeping("10 01 11 11")))
