"""Tokenizers of one token a word, so that a token says which document it came from."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = 400


@pytest.fixture(scope="session")
def make_tokenizer():
    """Builds a tokenizer with word `w<i>` as token `i + 4`, with or without an opening <bos>."""

    def make(adds_bos: bool = False, has_eos: bool = True) -> PreTrainedTokenizerFast:
        names = ["<pad>", "<unk>", "<bos>", "<eos>", *(f"w{i}" for i in range(WORDS)), "a"]
        vocabulary = {name: i for i, name in enumerate(names)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if adds_bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)]
            )
        special = {"eos_token": "<eos>"} if has_eos else {}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            pad_token="<pad>",
            bos_token="<bos>",
            model_max_length=16,
            **special,
        )

    return make
