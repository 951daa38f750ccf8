"""Sources and targets as an encoder-decoder takes them: a row of tokens to read and to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from depthsearch.calibration.parallel import Pair
from depthsearch.errors import ConfigError, DataError

_DRESS = 8
"""Tokens that a tokenizer puts around a text at the most, with room for what comes before."""


@dataclass(frozen=True)
class PairRows:
    """Makes rows of `pairs`, each `2 * window_tokens` ids long.

    The first half is the source as the tokenizer dresses it, the second what enters the decoder:
    its start token, then the target. What is longer is cut off, what is shorter is padded behind.
    """

    pairs: Mapping[str, Pair]
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)

    @property
    def pad(self) -> int:
        """The token that stands for nothing; raises DataError where model and tokenizer differ."""
        return pad_token(self.model, self.tokenizer)

    def rows(self, texts: Sequence[str], window_tokens: int) -> Tensor:
        """Ids `[text, 2 * window_tokens]` of texts that `pairs` are known by."""
        read = self._padded(self.sources(texts, window_tokens), window_tokens)
        # One less: the start token comes before it.
        targets = self._ids(
            [self.pairs[text].reference for text in texts], window_tokens - 1, target=True
        )
        return torch.cat([read, self._shifted(self._padded(targets, window_tokens))], dim=1)

    def sources(self, texts: Sequence[str], most: int) -> tuple[tuple[int, ...], ...]:
        """The ids of each source, `most` at the most."""
        return self._ids([self.pairs[text].prompt.rstrip("\n") for text in texts], most)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """What enters the decoder before the first word of any target, such as its language."""
        labels = self._padded(self._ids([""], _DRESS, target=True), _DRESS)
        found: list[int] = self._shifted(labels)[0].tolist()
        for last in (self.pad, self.tokenizer.eos_token_id):
            while len(found) > 1 and found[-1] == last:
                found.pop()
        return tuple(found)

    def _shifted(self, labels: Tensor) -> Tensor:
        """What enters the decoder where `labels` `[text, tokens]` are wanted."""
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:
            found: Tensor = shift(labels)
            return found
        start = self.model.config.decoder_start_token_id
        if start is None:
            raise DataError(
                "the model's config names no decoder_start_token_id, which comes before every "
                "target: add it to config.json"
            )
        return torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)

    def _ids(
        self, texts: Sequence[str], most: int, *, target: bool = False
    ) -> tuple[tuple[int, ...], ...]:
        if not texts:
            return ()
        named: dict[str, Any] = {"text_target" if target else "text": list(texts)}
        encoded = self.tokenizer(**named, truncation=True, max_length=most, verbose=False)
        return tuple(map(tuple, encoded["input_ids"]))

    def _padded(self, found: Sequence[Sequence[int]], width: int) -> Tensor:
        ids = torch.full((len(found), width), self.pad, dtype=torch.int64)
        for row, tokens in enumerate(found):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        return ids


def pad_token(model: Any, tokenizer: Any = None) -> int:
    """The padding token of a model; raises DataError for none, or where its tokenizer differs."""
    pad = model.config.pad_token_id
    if pad is None:
        raise DataError(
            "the model's config names no pad_token_id, which sources and targets of unequal length "
            "need: add it to config.json"
        )
    if tokenizer is not None and tokenizer.pad_token_id != pad:
        raise DataError(
            f"the model pads with token {pad} and its tokenizer with {tokenizer.pad_token_id}: "
            "correct pad_token_id in config.json, or get the tokenizer that belongs to the model"
        )
    return int(pad)


def set_languages(tokenizer: Any, source: str | None, target: str | None) -> None:
    """Have a tokenizer of many languages read one and write another; raises ConfigError.

    One that knows no languages takes none, and one that does needs both.
    """
    several = hasattr(tokenizer, "tgt_lang")
    if not several:
        if source is not None or target is not None:
            raise ConfigError(
                "the model's tokenizer knows no languages: leave calibration.source_language and "
                "calibration.target_language out"
            )
        return
    for key, attribute, language in (
        ("source_language", "src_lang", source),
        ("target_language", "tgt_lang", target),
    ):
        if language not in _languages(tokenizer):
            said = "is missing" if language is None else f"is {language!r}"
            near = get_close_matches(language or "", _languages(tokenizer), n=5, cutoff=0.3)
            some = ", ".join(near or _languages(tokenizer)[:5])
            raise ConfigError(
                f"calibration.{key} {said}, but the model's tokenizer needs the language as it "
                f"calls it, such as {some}"
            )
        setattr(tokenizer, attribute, language)


def _languages(tokenizer: Any) -> list[str]:
    """The names of languages that a tokenizer takes; some keep them as special tokens alone."""
    for name in ("lang_code_to_token", "lang_code_to_id"):
        found = getattr(tokenizer, name, None)
        if found:
            return sorted(map(str, found))
    usual = {"bos", "eos", "unk", "sep", "pad", "cls", "mask"}
    others = {getattr(tokenizer, f"{name}_token", None) for name in usual}
    return sorted(set(tokenizer.all_special_tokens) - others)
