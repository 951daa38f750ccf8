from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.tiny_models import MODEL_TYPES, PARALLEL_TYPES, SEQUENTIAL_TYPES, tiny_ids, tiny_model

from depthsearch.errors import UnsupportedModelError
from depthsearch.model.anatomy import describe
from depthsearch.model.replay import Mode, Replayer
from depthsearch.model.selfcheck import replay
from depthsearch.model.switches import masked
from depthsearch.space import Mask

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def random_masks(sites: int, count: int) -> list[Mask]:
    rng = np.random.default_rng(1)
    masks = [Mask(tuple(bool(k) for k in rng.random(sites) < 0.6)) for _ in range(count)]
    return [Mask.dense(sites), *masks, Mask((False,) * sites)]


@DTYPES
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_replay_is_bit_equal_to_a_masked_forward(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    replayer = Replayer(model, describe(model))
    recording = replayer.record(tiny_ids(rows=3))
    modes = [Mode.BLOCK] if model_type in PARALLEL_TYPES else [Mode.SITE, Mode.BLOCK]
    for mask in random_masks(8, 8):
        expected = replayer.whole(recording, mask)
        for mode in modes:
            assert torch.equal(replay(replayer, recording, mask, mode), expected), (mask.key, mode)


@DTYPES
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_of_replayed_states_are_those_of_the_model(
    model_type: str, dtype: torch.dtype
) -> None:
    model = tiny_model(model_type, dtype=dtype)
    anatomy, ids = describe(model), tiny_ids()
    replayer = Replayer(model, anatomy)
    recording = replayer.record(ids)
    mask = Mask.dropping(8, [1, 4])
    mode = Mode.BLOCK if anatomy.stack.row.parallel else Mode.SITE
    hidden = replay(replayer, recording, mask, mode)

    with masked(model, anatomy, mask), torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits

    got = replayer.logits(hidden.reshape(-1, hidden.shape[-1])).reshape(expected.shape)
    assert torch.allclose(got, expected, atol=1e-4 if dtype == torch.float32 else 0.1)
    assert torch.equal(got.argmax(-1), expected.argmax(-1)) or dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_more_positions_have_logits_than_a_context_holds(model_type: str) -> None:
    model = tiny_model(model_type)
    replayer = Replayer(model, describe(model))
    hidden = torch.randn(model.config.max_position_embeddings + 1, 64)
    assert torch.equal(replayer.logits(hidden)[:100], replayer.logits(hidden[:100]))


@pytest.mark.parametrize("model_type", SEQUENTIAL_TYPES)
def test_states_are_the_stream_before_every_site(model_type: str) -> None:
    model = tiny_model(model_type)
    replayer = Replayer(model, describe(model))
    recording = replayer.record(tiny_ids())

    states = replayer.states(recording)

    assert len(states) == 9
    assert torch.equal(states[0], recording.first)
    assert torch.equal(states[-1], recording.last)
    for site in range(9):
        before = Mask(tuple(index < site for index in range(8)))
        assert torch.equal(states[site], replayer.whole(recording, before))


def test_a_dropped_block_costs_no_forward() -> None:
    model = tiny_model("llama")
    replayer = Replayer(model, describe(model))
    recording = replayer.record(tiny_ids())
    hidden = recording.first

    assert replayer.step(recording, 1, hidden, attention=False, ffn=False) is hidden


def test_recording_leaves_no_hooks_even_on_an_error() -> None:
    model = tiny_model("llama")
    anatomy = describe(model)
    replayer = Replayer(model, anatomy)

    with pytest.raises(IndexError):
        replayer.record(torch.full((1, 4), 10_000))
    replayer.record(tiny_ids())

    for block in anatomy.block_list(model):
        assert not block._forward_hooks
        assert not block._forward_pre_hooks


def test_a_model_that_skips_blocks_is_refused() -> None:
    model = tiny_model("llama")
    replayer = Replayer(model, describe(model))
    model.config.num_hidden_layers = 3

    with pytest.raises(UnsupportedModelError, match="3 blocks of 4"):
        replayer.record(tiny_ids())
