from __future__ import annotations

import dataclasses

import pytest
from tests.tiny_models import MODEL_TYPES, PARALLEL_TYPES, tiny_config, tiny_model
from transformers import (
    AutoModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
)

from depthsearch.errors import UnsupportedModelError
from depthsearch.model.anatomy import describe
from depthsearch.model.families import FAMILIES


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_block_becomes_an_attention_and_an_ffn_site(model_type: str) -> None:
    model = tiny_model(model_type, blocks=3)

    anatomy = describe(model)

    assert anatomy.model_type == model_type
    assert anatomy.model_class == type(model).__name__
    assert [site.name for site in anatomy.sites] == [
        f"decoder.{block}.{kind}" for block in range(3) for kind in ("attention", "ffn")
    ]
    assert [site.index for site in anatomy.sites] == list(range(6))
    assert anatomy.sites_of(2) == anatomy.sites[4:]
    assert anatomy.stack.blocks == len(anatomy.block_list(model)) == 3
    assert anatomy.stack.row.parallel == (model_type in PARALLEL_TYPES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_rows_norms_and_sublayers_are_all_of_a_block(model_type: str) -> None:
    model = tiny_model(model_type, blocks=2)
    anatomy = describe(model)
    row = anatomy.stack.row

    named = {row.attention, row.ffn, *row.attention_norms, *row.ffn_norms, *row.shared_norms}
    with_weights = {
        name
        for name, child in anatomy.block_list(model)[0].named_children()
        if any(True for _ in child.parameters())
    }

    assert named == with_weights


def test_an_unlisted_encoder_decoder_is_refused_with_its_class() -> None:
    model = PegasusForConditionalGeneration(
        PegasusConfig(vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1)
    )

    with pytest.raises(UnsupportedModelError, match=r"PegasusForCond.*'pegasus'.*families"):
        describe(model)


def test_an_unlisted_decoder_is_refused_with_its_class_and_what_it_needs() -> None:
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )

    with pytest.raises(UnsupportedModelError, match=r"GPTNeoXForCausalLM.*a row.*attention"):
        describe(model)


def test_a_model_without_a_head_is_refused() -> None:
    headless = AutoModel.from_config(tiny_config("llama", blocks=2))

    with pytest.raises(UnsupportedModelError, match="LlamaModel has no language-model head"):
        describe(headless)


def test_a_row_that_names_missing_children_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(FAMILIES["llama"], ffn_norms=("no_such_norm",))
    monkeypatch.setitem(FAMILIES, "llama", row)

    with pytest.raises(UnsupportedModelError, match=r"0 lists of blocks.*families\.py"):
        describe(tiny_model("llama", blocks=2))


def test_a_model_of_one_block_is_described() -> None:
    assert len(describe(tiny_model("llama", blocks=1)).sites) == 2
