"""Models with two stacks: what is a site there, what masks do, and that replay is exact."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import ENCODER_DECODER_TYPES, VOCAB, paired_ids, tiny_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from depthsearch.errors import UnsupportedModelError
from depthsearch.model.anatomy import Anatomy, describe
from depthsearch.model.costs import cost_table, head_flops
from depthsearch.model.families import ENCODER_DECODERS
from depthsearch.model.placement import Placement, place
from depthsearch.model.replay import Mode, Replayer
from depthsearch.model.selfcheck import replay, self_check
from depthsearch.model.switches import masked
from depthsearch.space import Mask, mask_from_names

SITES = 17
"""Of four encoder blocks with two sublayers and three decoder blocks with three."""

EVERY = pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def some_masks() -> list[Mask]:
    rng = np.random.default_rng(1)
    drawn = [Mask(tuple(bool(k) for k in rng.random(SITES) < 0.6)) for _ in range(6)]
    return [Mask.dense(SITES), *drawn, Mask((False,) * SITES)]


def plain(model: Any, ids: Tensor, **further: Any) -> Any:
    """An ordinary forward pass of rows that hold what is read and what is written."""
    read, written = ids.chunk(2, dim=1)
    with torch.no_grad():
        return model(
            input_ids=read,
            attention_mask=(read != 0).long(),
            decoder_input_ids=written,
            **further,
        )


@EVERY
def test_sites_are_those_of_both_stacks_in_the_order_in_which_they_run(model_type: str) -> None:
    model = tiny_model(model_type)
    anatomy = describe(model)

    assert [site.name for site in anatomy.sites] == [
        *(f"encoder.{block}.{kind}" for block in range(4) for kind in ("attention", "ffn")),
        *(
            f"decoder.{block}.{kind}"
            for block in range(3)
            for kind in ("attention", "cross_attention", "ffn")
        ),
    ]
    assert [site.index for site in anatomy.sites] == list(range(SITES))
    assert anatomy.encoder_blocks == 4
    assert anatomy.stack_ends == (8, SITES)
    assert anatomy.sites_of(5) == anatomy.sites[11:14]
    assert [anatomy.block_of(site) for site in anatomy.sites_of(5)] == [5, 5, 5]
    assert len(anatomy.block_list(model)) == len(anatomy.rows) == 7
    assert describe(tiny_model("llama")).encoder_blocks == 0


@EVERY
def test_a_stack_of_its_own_is_not_to_be_had(model_type: str) -> None:
    anatomy = describe(tiny_model(model_type))
    with pytest.raises(UnsupportedModelError, match="is an encoder-decoder"):
        _ = anatomy.stack


@EVERY
def test_all_weights_of_a_block_belong_to_one_of_its_sublayers(model_type: str) -> None:
    model = tiny_model(model_type)
    anatomy = describe(model)
    for number, block in enumerate(anatomy.block_list(model)):
        named: list[str] = []
        for kind in anatomy.rows[number].kinds:
            paths = anatomy.rows[number].parts(kind)
            named += [
                name
                for name, _ in block.named_parameters()
                if any(name.startswith(f"{path}.") for path in paths)
            ]
        assert sorted(named) == sorted(name for name, _ in block.named_parameters())


def test_an_encoder_alone_is_refused() -> None:
    model = T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2))
    with pytest.raises(UnsupportedModelError, match="T5EncoderModel has no language-model head"):
        describe(model)


@DTYPES
@EVERY
def test_every_family_passes_the_check(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check = self_check(model, describe(model))
    assert check.mode is Mode.SITE
    assert check.replay_difference == 0.0
    assert {"encoder.0.attention", "encoder.3.ffn"} <= set(check.sites_checked)
    assert {"decoder.0.cross_attention", "decoder.2.ffn"} <= set(check.sites_checked)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("model_type", "stack", "wrong"),
    [
        # A norm that goes with another sublayer than its own.
        ("mbart", "decoder", {"cross_attention_norms": (), "ffn_norms": (
            "encoder_attn_layer_norm", "final_layer_norm")}),
        ("marian", "encoder", {"attention_norms": ()}),
        # A projection that does not write to the stream.
        ("t5", "decoder", {"attention_out": "q"}),
        ("bart", "encoder", {"ffn": "fc1", "ffn_inner": ()}),
    ],
)  # fmt: skip
def test_a_row_that_does_not_describe_its_blocks_is_refused(
    model_type: str, stack: str, wrong: dict[str, Any]
) -> None:
    model = tiny_model(model_type)
    anatomy = describe(model)
    stacks = tuple(
        dataclasses.replace(s, row=dataclasses.replace(s.row, **wrong)) if s.name == stack else s
        for s in anatomy.stacks
    )
    false = Anatomy(anatomy.model_type, anatomy.model_class, stacks, anatomy.sites)
    with pytest.raises((UnsupportedModelError, RuntimeError)):
        self_check(model, false)


@DTYPES
@EVERY
def test_replay_is_bit_equal_to_a_masked_forward(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    replayer = Replayer(model, describe(model))
    recording = replayer.record(paired_ids())
    assert torch.equal(recording.last, replayer.whole(recording, Mask.dense(SITES)))
    for mask in some_masks():
        expected = replayer.whole(recording, mask)
        assert torch.equal(replay(replayer, recording, mask, Mode.SITE), expected), mask.key


@EVERY
def test_a_forward_is_that_of_the_masked_model(model_type: str) -> None:
    model = tiny_model(model_type)
    anatomy, ids = describe(model), paired_ids()
    replayer = Replayer(model, anatomy)
    recording = replayer.record(ids)
    for mask in some_masks():
        hidden = replayer.half(replay(replayer, recording, mask, Mode.SITE), block=4)
        with masked(model, anatomy, mask):
            expected = plain(model, ids, use_cache=False).logits
        found = replayer.logits(hidden.flatten(0, 1)).view_as(expected)
        assert torch.allclose(found, expected, atol=1e-4), mask.key


@pytest.mark.parametrize(
    # Elsewhere a norm stands behind the addition, which goes too, and which zeros would still pass.
    "model_type",
    [name for name, family in ENCODER_DECODERS.items() if not family.decoder.post_norm],
)
def test_dropping_what_writes_is_dropping_the_sublayer(model_type: str) -> None:
    """For each site of the middle blocks: as with weights of zero."""
    model = tiny_model(model_type)
    anatomy, ids = describe(model), paired_ids()
    for site in (*anatomy.sites_of(1), *anatomy.sites_of(5)):
        with masked(model, anatomy, Mask.dropping(SITES, [site.index])):
            dropped = plain(model, ids, use_cache=False).logits
        number = anatomy.block_of(site)
        writer = anatomy.block_list(model)[number].get_submodule(
            anatomy.rows[number].projection(site.kind)
        )
        saved = {name: p.clone() for name, p in writer.named_parameters()}
        for parameter in writer.parameters():
            parameter.zero_()
        zeroed = plain(model, ids, use_cache=False).logits
        for name, parameter in writer.named_parameters():
            parameter.copy_(saved[name])
        assert torch.equal(dropped, zeroed), site.name
        assert not torch.allclose(dropped, plain(model, ids, use_cache=False).logits)


@EVERY
@pytest.mark.parametrize(
    "dropped",
    [
        ("decoder.0.attention",),
        ("encoder.0.attention", "decoder.0.attention", "decoder.0.cross_attention"),
        ("decoder.1.cross_attention", "decoder.2.attention", "encoder.2"),
        ("decoder.0", "encoder.0"),
    ],
    ids=" ".join,
)
def test_a_masked_model_decodes_with_a_cache_as_without(
    model_type: str, dropped: tuple[str, ...]
) -> None:
    model = tiny_model(model_type)
    anatomy, ids = describe(model), paired_ids()
    read, written = ids.chunk(2, dim=1)
    with masked(model, anatomy, mask_from_names(anatomy.sites, dropped)), torch.no_grad():
        whole = plain(model, ids, use_cache=False).logits
        cache = model(
            input_ids=read,
            attention_mask=(read != 0).long(),
            decoder_input_ids=written[:, :9],
            use_cache=True,
        )
        found = [cache.logits]
        for place in range(9, written.shape[1]):
            cache = model(
                encoder_outputs=(cache.encoder_last_hidden_state,),
                attention_mask=(read != 0).long(),
                decoder_input_ids=written[:, place : place + 1],
                past_key_values=cache.past_key_values,
                use_cache=True,
            )
            found.append(cache.logits)
    assert float((torch.cat(found, dim=1) - whole).abs().max()) < 1e-5 * float(whole.abs().max())


@EVERY
def test_states_are_the_streams_before_every_site(model_type: str) -> None:
    model = tiny_model(model_type)
    replayer = Replayer(model, describe(model))
    recording = replayer.record(paired_ids())
    states = replayer.states(recording)
    assert len(states) == SITES + 1
    assert torch.equal(states[-1], recording.last)
    for site in range(SITES + 1):
        before = Mask(tuple(index < site for index in range(SITES)))
        assert torch.equal(states[site], replayer.whole(recording, before))


def test_what_is_padding_counts_nowhere_but_for_the_first_token_written() -> None:
    model = tiny_model("t5")
    replayer = Replayer(model, describe(model))
    ids = torch.tensor([[5, 6, 0, 0, 0, 7, 8, 0]])
    seen = replayer.seen(ids)
    assert seen is not None
    assert seen.tolist() == [[True, True, False, False, True, True, True, False]]
    assert replayer.half(ids, 3).tolist() == [[5, 6, 0, 0]]
    assert replayer.half(ids, 4).tolist() == [[0, 7, 8, 0]]
    llama = tiny_model("llama")
    other = Replayer(llama, describe(llama))
    assert other.seen(ids) is None
    assert other.half(ids, 0) is ids


def test_a_model_that_can_t_pad_is_refused() -> None:
    model = tiny_model("t5")
    model.config.pad_token_id = None
    with pytest.raises(UnsupportedModelError, match="names no pad_token_id"):
        _ = Replayer(model, describe(model)).pad


@EVERY
def test_costs_sum_to_the_model_and_what_is_gone_is_what_a_smaller_model_lacks(
    model_type: str,
) -> None:
    model = tiny_model(model_type)
    anatomy = describe(model)
    table = cost_table(model, anatomy)
    smaller = tiny_model(model_type, blocks=3)
    mask = mask_from_names(anatomy.sites, ["encoder.2", "decoder.1"])
    for cost, width in (("params", 1), ("bytes", 4)):
        assert table.total(cost) == width * model.num_parameters()
        assert table.cost(cost, mask) == width * smaller.num_parameters()
    first = mask_from_names(anatomy.sites, ["encoder.0", "decoder.0"])
    assert table.cost("params", first) == table.cost("params", mask)


@EVERY
def test_flops_are_those_of_a_token_read_and_a_token_written(model_type: str) -> None:
    """Twice as many tokens less once as many: attention grows with the context."""
    model = tiny_model(model_type, attn_implementation="eager")
    tokens = 24
    ids = torch.randint(3, VOCAB, (1, 2 * tokens), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        plain(model, ids, use_cache=False)
    table = cost_table(model, describe(model), context_tokens=tokens)
    assert tokens * table.total("flops") == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert head_flops(model) == 2 * 64 * VOCAB


@EVERY
def test_the_decoder_alone_keeps_keys_and_values(model_type: str) -> None:
    model = tiny_model(model_type)
    anatomy = describe(model)
    found = cost_table(model, anatomy).of("kv_bytes").sites
    for site, size in zip(anatomy.sites, found, strict=True):
        held = site.stack == "decoder" and site.kind != "ffn"
        assert size == (2 * 64 * 4 if held else 0), site.name


def test_blocks_of_both_stacks_may_lie_on_different_devices() -> None:
    """On one device here, which goes the same way through the hooks."""
    model = tiny_model("t5")
    anatomy = describe(model)
    before = plain(model, paired_ids(), use_cache=False).logits
    here = torch.device("cpu")
    place(model, anatomy, Placement(here, (here,) * 7))
    assert torch.equal(plain(model, paired_ids(), use_cache=False).logits, before)


def test_every_family_has_a_norm_of_the_encoder_that_its_model_has() -> None:
    for model_type, family in ENCODER_DECODERS.items():
        model = tiny_model(model_type)
        encoder = model.get_encoder()
        norms = [name for name, _ in encoder.named_children() if name.endswith("norm")]
        expected = [] if family.encoder_norm is None else [family.encoder_norm.split(".")[-1]]
        assert norms == expected, model_type
