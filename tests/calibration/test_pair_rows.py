"""Rows of tokens to read and to write, for encoder-decoders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny_models import ENCODER_DECODER_TYPES, tiny_model, tiny_tokenizer
from transformers import NllbTokenizer

from depthsearch.calibration.pair_rows import PairRows, pad_token, set_languages
from depthsearch.calibration.parallel import Pair
from depthsearch.calibration.tasks import translation_task
from depthsearch.calibration.text import Documents
from depthsearch.calibration.windows import make_splits
from depthsearch.errors import ConfigError, DataError

PAIRS = {
    f"text {number}": Pair(f"the mask keeps {number}\n", " ".join(["drops"] * (number % 7 + 1)))
    for number in range(60)
}


def pair_rows(model_type: str = "t5") -> PairRows:
    return PairRows(PAIRS, tiny_model(model_type), tiny_tokenizer())


@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_a_row_is_the_source_and_what_enters_the_decoder(model_type: str) -> None:
    rows, tokenizer = pair_rows(model_type), tiny_tokenizer()
    found = rows.rows(["text 5", "text 0"], 24)
    assert found.shape == (2, 48)
    for row, number in zip(found, (5, 0), strict=True):
        source = tokenizer(f"the mask keeps {number}")["input_ids"]
        target = tokenizer(PAIRS[f"text {number}"].reference)["input_ids"]
        read, written = row[:24].tolist(), row[24:].tolist()
        assert read == source + [0] * (24 - len(source))
        if model_type == "mbart":
            # What comes first is the language, which stands last in what is wanted.
            assert written[0] == target[-1]
        else:
            assert written[0] == rows.model.config.decoder_start_token_id
        assert written[1 : len(target) + 1] == target
        assert set(written[len(target) + 1 :]) == {0}


def test_what_is_too_long_is_cut_off_and_the_start_still_comes_first() -> None:
    rows, tokenizer = pair_rows(), tiny_tokenizer()
    (row,) = rows.rows(["text 6"], 4)
    assert row.tolist()[:4] == tokenizer("the mask keeps 6")["input_ids"][:4]
    assert row.tolist()[4:] == [0, *tokenizer(" ".join(["drops"] * 7))["input_ids"][:3]]


@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_a_target_starts_with_the_models_start_token(model_type: str) -> None:
    rows = pair_rows(model_type)
    expected = 0 if model_type in ("t5", "mt5") else 2
    if model_type != "mbart":
        assert rows.starts == (expected,)


def test_an_answer_that_does_not_fit_is_told() -> None:
    with pytest.raises(DataError, match=r"max_new_tokens = 128 do not fit.*context of 128"):
        translation_task(pair_rows("m2m_100"), ["text 1"], 16, 128)


def test_no_texts_make_no_rows() -> None:
    assert pair_rows().rows([], 8).shape == (0, 16)


def test_splits_share_no_pair_and_hold_one_row_for_each_window() -> None:
    rows = pair_rows()
    documents = Documents.of(PAIRS, "pairs.jsonl")
    args = (documents, rows.tokenizer, 16, 160, 80, 80, 0.2)
    splits = make_splits(*args, seed=3, fit_tokens=96, pairs=rows)
    sizes = [len(part) for part in (splits.select, splits.finals, splits.heldout, splits.fit)]
    assert sizes == [10, 5, 5, 6]
    assert all(p.shape[1] == 32 for p in (splits.select, splits.finals, splits.heldout, splits.fit))
    everything = torch.cat([splits.select, splits.finals, splits.heldout, splits.fit])
    assert len({tuple(row.tolist()) for row in everything}) == 26
    again = make_splits(*args, seed=4, fit_tokens=96, pairs=rows)
    assert torch.equal(again.heldout, splits.heldout)
    assert not torch.equal(again.select, splits.select)


def test_too_few_pairs_are_told() -> None:
    rows = pair_rows()
    documents = Documents.of(PAIRS, "pairs.jsonl")
    with pytest.raises(
        DataError, match=r"select split needs 100 sources with their targets.*48 ar"
    ):
        make_splits(documents, rows.tokenizer, 16, 1600, 80, 80, 0.2, 0, pairs=rows)


def test_a_start_token_is_needed() -> None:
    rows = pair_rows("m2m_100")
    rows.model.config.decoder_start_token_id = None
    with pytest.raises(DataError, match="names no decoder_start_token_id"):
        rows.rows(["text 1"], 8)


def test_padding_is_that_of_model_and_tokenizer() -> None:
    model, tokenizer = tiny_model("t5"), tiny_tokenizer()
    assert pad_token(model, tokenizer) == 0
    tokenizer.pad_token = "</s>"
    with pytest.raises(DataError, match="pads with token 0 and its tokenizer with 2"):
        pad_token(model, tokenizer)
    model.config.pad_token_id = None
    with pytest.raises(DataError, match="names no pad_token_id"):
        pad_token(model, tokenizer)


def many_languages(**more: Any) -> Any:
    return SimpleNamespace(src_lang="en", tgt_lang=None, **more)


def test_languages_are_set_where_the_tokenizer_knows_them() -> None:
    tokenizer = many_languages(lang_code_to_id={"en": 5, "de": 6, "cs": 7})
    set_languages(tokenizer, "cs", "de")
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("cs", "de")


def nllb_tokenizer() -> NllbTokenizer:
    """The real class with letters for a vocabulary; languages are tokens of their own."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", "en", *"abcdefgh"]
    return NllbTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[])


def test_a_source_and_its_target_are_in_their_languages() -> None:
    tokenizer = nllb_tokenizer()
    model = tiny_model("m2m_100", vocab_size=400, pad_token_id=1)
    set_languages(tokenizer, "ces_Latn", "deu_Latn")
    rows = PairRows({"one": Pair("bad", "ace")}, model, tokenizer)
    (row,) = rows.rows(["one"], 9)
    named = tokenizer.convert_ids_to_tokens(row.tolist())
    assert named[:9] == ["ces_Latn", "▁", "b", "a", "d", "</s>", *["<pad>"] * 3]
    assert named[9:] == ["</s>", "deu_Latn", "▁", "a", "c", "e", "</s>", *["<pad>"] * 2]
    assert tokenizer.convert_ids_to_tokens(list(rows.starts)) == ["</s>", "deu_Latn"]
    task = translation_task(rows, ["one"], 9, 20)
    assert task.prompts == (tuple(row.tolist()[:6]),)
    assert task.references == ("ace",)
    assert (task.starts, task.ends, task.longest) == (rows.starts, (2,), 6)
    assert task.texts([rows.rows(["one"], 9)[0, 11:].tolist()]) == ("ace",)


def test_text_that_is_no_language_is_told() -> None:
    """Also where it is a piece of the vocabulary, or a special token of another use."""
    for wrong in ("en", "</s>", "German"):
        with pytest.raises(ConfigError, match=f"source_language is '{wrong}'.*_"):
            set_languages(nllb_tokenizer(), wrong, "deu_Latn")


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (None, "de", r"source_language is missing.*such as cs, de, en"),
        ("cs", None, "target_language is missing"),
        ("xx", "de", "source_language is 'xx'"),
    ],
)
def test_a_language_that_is_missing_or_unknown_is_told(
    source: str | None, target: str | None, message: str
) -> None:
    tokenizer = many_languages(lang_code_to_id={"en": 5, "de": 6, "cs": 7})
    with pytest.raises(ConfigError, match=message):
        set_languages(tokenizer, source, target)


def test_a_tokenizer_of_no_language_takes_none() -> None:
    set_languages(tiny_tokenizer(), None, None)
    with pytest.raises(ConfigError, match="knows no languages"):
        set_languages(tiny_tokenizer(), "en", "de")
