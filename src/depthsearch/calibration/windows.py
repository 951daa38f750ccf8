"""Cut documents into token windows, in splits that share no document.

held-out    the same documents for every seed: what final figures are measured on
select      drawn by the seed: the search compares masks on it, window by window in random order
finals      drawn by the seed: the search re-ranks its finalists on it
fit         drawn by the seed: repairs are fitted on it, and nothing is judged
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from depthsearch.calibration.pair_rows import PairRows
from depthsearch.calibration.text import Documents, distinct
from depthsearch.errors import DataError

HELDOUT_SEED = 20_250_117
"""Fixes which documents are held out, whatever the seed of a run."""

_DOCUMENTS_AT_ONCE = 64
_ORDER, _FINALS = 2, 5
"""Sets the order of the windows apart from other draws of one seed."""
_OTHERS = 3
_BLOCK = 20
"""So many windows in a row have exactly their share of another text."""
_PLACES_SEED = 2150
"""Of thousands that were tried the one that spreads short texts of any share most evenly."""
_EXACT = 1e-9
"""Keeps a share such as 0.1 of ten windows from falling below one by rounding."""


@dataclass(frozen=True)
class Splits:
    """Token windows of disjoint sets of documents, each `[n, window_tokens]` of int64.

    `select_texts`, `finals_texts` and `heldout_texts` are the documents that went into those
    windows.
    """

    select: Tensor
    finals: Tensor
    heldout: Tensor
    fit: Tensor
    fingerprint: str
    window_tokens: int
    select_texts: tuple[str, ...] = ()
    finals_texts: tuple[str, ...] = ()
    heldout_texts: tuple[str, ...] = ()


def make_splits(
    documents: Documents,
    tokenizer: Any,
    window_tokens: int,
    select_tokens: int,
    finals_tokens: int,
    heldout_tokens: int,
    heldout_fraction: float,
    seed: int,
    fit_tokens: int = 0,
    fit_other: Other | None = None,
    pairs: PairRows | None = None,
    fit_key: str = "fit_tokens",
) -> Splits:
    """Tokenize as many documents as needed and pack each split into windows of one length.

    Repeated texts count once, so that none can stand on both sides of a split. A share
    `heldout_fraction` of the documents is held out, chosen independently of `seed`; the rest is
    shuffled by `seed` and dealt first to `select`, then to `finals`, then to `fit`. Within a split
    documents are joined by the end-of-text token (by nothing where the tokenizer has none) and cut
    into non-overlapping windows. Tokens which the tokenizer itself puts before a text, such as
    Gemma's begin-of-text token, open every window. Each split has `tokens // window_tokens`
    windows; a split asked for with 0 tokens is empty.

    With `pairs` every document is a source and its target, and makes one row `2 * window_tokens`
    long for an encoder-decoder; a window's tokens count once.

    With `fit_other` a share of the fit windows is from those documents, spread evenly among the
    others; what `documents` holds as well, be it as the source or target of one, is left out of it.

    Raises DataError where the figures don't fit together or the text is too short, which calls
    `fit_tokens` by the name `fit_key`.
    """
    prefix = opening_tokens(tokenizer) if pairs is None else ()
    asked = {
        "select": select_tokens,
        "finals": finals_tokens,
        "heldout": heldout_tokens,
        "fit": fit_tokens,
    }
    if window_tokens < len(prefix) + 2:
        raise DataError(f"window_tokens is {window_tokens}; allowed: {len(prefix) + 2} or more")
    for name, tokens in asked.items():
        if tokens < 0 or 0 < tokens < window_tokens:
            raise DataError(
                f"{name}_tokens is {tokens}; allowed: 0, or at least one window of {window_tokens}"
            )
    held, rest = _dealt(documents, heldout_fraction, seed)
    packer = _Packer(tokenizer, prefix, window_tokens, documents.source, pairs, fit_key)
    heldout, judged = packer.pack(held, heldout_tokens, "heldout")
    select, used = packer.pack(rest, select_tokens, "select")
    finals, more = packer.pack(rest[used:], finals_tokens, "finals")
    theirs = fit_other.places(fit_tokens // window_tokens) if fit_other is not None else []
    own_tokens = fit_tokens - sum(theirs) * window_tokens
    fit, _ = packer.pack(rest[used + more :], own_tokens, "fit")
    if fit_other is not None and any(theirs):
        fit = fit_other.mixed_into(fit, theirs, documents, packer, seed)
    # Races and finals judge by the first windows, which must stand for all: neighbours share a
    # document.
    select, finals = (_mixed(part, seed, n) for part, n in ((select, _ORDER), (finals, _FINALS)))
    digest = hashlib.sha256(f"window={window_tokens}".encode())
    for windows in (select, finals, heldout, *([fit] if len(fit) else [])):
        digest.update(len(windows).to_bytes(8, "little"))
        digest.update(windows.numpy().astype("<i8").tobytes())
    return Splits(
        select,
        finals,
        heldout,
        fit,
        digest.hexdigest(),
        window_tokens,
        tuple(rest[:used]),
        tuple(rest[used : used + more]),
        tuple(held[:judged]),
    )


def _mixed(windows: Tensor, seed: int, stream: int) -> Tensor:
    """The windows in an order drawn by `seed`, each stream of draws one of its own."""
    order = np.random.default_rng([seed, stream]).permutation(len(windows))
    return windows[torch.from_numpy(order)]


def draw_windows(
    documents: Documents,
    tokenizer: Any,
    window_tokens: int,
    tokens: int,
    draws: int,
    heldout_fraction: float,
    seed: int,
    finals_tokens: int = 0,
) -> tuple[Tensor, ...]:
    """Several samples of text for a search, each `[tokens // window_tokens, window_tokens]`.

    The first holds the windows that `make_splits` selects with this seed, in the order of the text;
    each of the others is as much text of further documents, but for those of its finals with
    `finals_tokens`. No two share a document, and none holds held-out text. Raises DataError where
    the figures don't fit together or the text is too short.
    """
    prefix = opening_tokens(tokenizer)
    if window_tokens < len(prefix) + 2 or tokens < window_tokens:
        raise DataError(
            f"windows of {window_tokens} tokens in samples of {tokens} tokens were asked for; "
            f"allowed: {len(prefix) + 2} or more, and at least one window in a sample"
        )
    _, rest = _dealt(documents, heldout_fraction, seed)
    packer = _Packer(tokenizer, prefix, window_tokens, documents.source)
    found: list[Tensor] = []
    used = 0
    for draw in range(draws):
        try:
            windows, more = packer.pack(rest[used:], tokens, "select")
        except DataError as error:
            if not draw:
                raise
            raise DataError(
                f"{documents.source}: holds {draw} samples of {tokens:,} tokens that share no "
                f"document, and {draws} were asked for; ask for fewer, lower select_tokens, or "
                "give more text"
            ) from error
        found.append(windows)
        used += more
        if not draw and draws > 1:
            _, more = packer.pack(rest[used:], finals_tokens, "finals")
            used += more
    return tuple(found)


def _dealt(documents: Documents, heldout_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """The different texts held out, the same for every seed, and the rest shuffled by `seed`."""
    if not 0 < heldout_fraction < 1:
        raise DataError(f"heldout_fraction is {heldout_fraction}; allowed: between 0 and 1")
    texts = distinct(documents.texts)
    if len(texts) < 3:
        raise DataError(
            f"{documents.source}: {len(texts)} different documents found, at least 3 are needed "
            "since splits are made by document; separate documents in txt files by blank lines"
        )
    held_count = min(max(1, round(len(texts) * heldout_fraction)), len(texts) - 2)
    order = np.random.default_rng(HELDOUT_SEED).permutation(len(texts))
    held = [texts[i] for i in order[:held_count]]
    rest_order = np.random.default_rng(seed).permutation(len(texts) - held_count)
    return held, [texts[i] for i in np.sort(order[held_count:])[rest_order]]


def text_windows(
    documents: Documents,
    tokenizer: Any,
    window_tokens: int,
    tokens: int,
    pairs: PairRows | None = None,
) -> Tensor:
    """Windows `[n, window_tokens]` of a text that is not split, at most `tokens` tokens of it.

    Each different document counts once, in one fixed shuffled order, so that a part of a long text
    stands for the whole. With `pairs` each makes a row, as in `make_splits`. Raises DataError where
    there is not even one window.
    """
    return text_sample(documents, tokenizer, window_tokens, tokens, pairs)[0]


def text_sample(
    documents: Documents,
    tokenizer: Any,
    window_tokens: int,
    tokens: int,
    pairs: PairRows | None = None,
) -> tuple[Tensor, tuple[str, ...]]:
    """As `text_windows`, with the documents that went into the windows."""
    prefix = opening_tokens(tokenizer) if pairs is None else ()
    if window_tokens < len(prefix) + 2 or tokens < window_tokens:
        raise DataError(
            f"windows of {window_tokens} tokens in {tokens} tokens of text were asked for; "
            f"allowed: {len(prefix) + 2} or more, and at least one window of text"
        )
    texts = fixed_order(documents)
    count = tokens // window_tokens
    if pairs is not None:
        return pairs.rows(texts[:count], window_tokens), tuple(texts[:count])
    packer = _Packer(tokenizer, prefix, window_tokens, documents.source)
    body = window_tokens - len(prefix)
    stream, used = packer.stream(texts, count * body)
    if len(stream) < body:
        raise DataError(
            f"{documents.source}: holds {len(stream):,} tokens, less than one window of "
            f"{window_tokens}; lower window_tokens, or give more text"
        )
    return packer.rows(stream, min(count, len(stream) // body)), tuple(texts[:used])


def fixed_order(documents: Documents) -> list[str]:
    """The different texts in one shuffled order, so that a part of them stands for the whole."""
    texts = distinct(documents.texts)
    order = np.random.default_rng(HELDOUT_SEED).permutation(len(texts))
    return [texts[i] for i in order]


def check_windows(windows: Tensor, rows: int, context: int | None) -> None:
    """Raise DataError for `windows` `[n, window]` of token ids that a model can't take.

    `rows` is how many tokens it has embeddings for, `context` the most tokens of a window, None
    where it sets no limit.
    """
    if context is not None and windows.shape[1] > context:
        raise DataError(
            f"the windows have {windows.shape[1]} tokens, but the model's context is {context}; "
            f"lower window_tokens to {context} or less"
        )
    if len(windows) and (int(windows.max()) >= rows or int(windows.min()) < 0):
        raise DataError(
            f"the windows hold token {int(windows.max())}, but the model's vocabulary has {rows}; "
            "tokenize with the model's own tokenizer"
        )


def batches(windows: Tensor, batch_tokens: int) -> tuple[Tensor, ...]:
    """Group `windows` `[n, window]` in order into batches of at most `batch_tokens` tokens.

    A batch holds one window at least; the last one may hold fewer than the others. The result
    depends on nothing but the two arguments, so a loss is the same on one worker or many.
    """
    if batch_tokens < 1:
        raise DataError(f"batch_tokens is {batch_tokens}; allowed: 1 or more")
    if not len(windows):
        return ()
    rows = max(1, batch_tokens // windows.shape[1])
    return tuple(windows[start : start + rows] for start in range(0, len(windows), rows))


def opening_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokens which `tokenizer` puts before a text of its own accord, found by asking it."""
    alone = _ids(tokenizer, "a", special=False)
    dressed = _ids(tokenizer, "a", special=True)
    for start in range(len(dressed) - len(alone) + 1):
        if dressed[start : start + len(alone)] == alone:
            return tuple(dressed[:start])
    return ()


def opened(ids: Sequence[int], opening: tuple[int, ...]) -> tuple[int, ...]:
    """The ids of a text behind the tokens that open every text, unless it has them already."""
    return tuple(ids) if tuple(ids[: len(opening)]) == opening else (*opening, *ids)


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


@dataclass(frozen=True)
class Other:
    """Documents of another kind that a `share` of the fit windows, in (0, 1], is made of."""

    documents: Documents
    share: float

    def places(self, count: int) -> list[bool]:
        """Which of `count` windows they are, the same for any first part.

        Each block of 20 windows has its share of them, at places drawn anew: whoever takes every
        fifth batch would else take all of them, or none.
        """
        found: list[bool] = []
        while len(found) < count:
            before, after = (
                math.floor(self.share * end + _EXACT) for end in (len(found), len(found) + _BLOCK)
            )
            rng = np.random.default_rng([_PLACES_SEED, len(found) // _BLOCK])
            drawn = rng.permutation(_BLOCK)
            found += [bool(place < after - before) for place in drawn]
        return found[:count]

    def mixed_into(
        self, own: Tensor, theirs: Sequence[bool], known: Documents, packer: _Packer, seed: int
    ) -> Tensor:
        """The windows `own` `[n, window]` with those of the other documents at their places.

        Raises DataError where these are too short without those that are `known`.
        """
        texts = self.documents.unlike(known)
        order = np.random.default_rng([seed, _OTHERS]).permutation(len(texts))
        body = packer.window_tokens - len(packer.prefix)
        stream, _ = packer.stream([texts[i] for i in order], sum(theirs) * body)
        if len(stream) < sum(theirs) * body:
            raise DataError(
                f"{self.documents.source}: repairs need {sum(theirs) * packer.window_tokens:,} "
                f"tokens of it, but its {len(texts):,} documents that the calibration text does "
                f"not hold have {len(stream) // body * packer.window_tokens:,}; lower fit_share or "
                f"{packer.fit_key}, or give more text"
            )
        fit = torch.empty((len(theirs), packer.window_tokens), dtype=torch.int64)
        places = torch.tensor(theirs)
        fit[places] = packer.rows(stream, sum(theirs))
        fit[~places] = own
        return fit


@dataclass(frozen=True)
class _Packer:
    tokenizer: Any
    prefix: tuple[int, ...]
    window_tokens: int
    source: str
    pairs: PairRows | None = None
    fit_key: str = "fit_tokens"

    def pack(self, texts: Sequence[str], tokens: int, split: str) -> tuple[Tensor, int]:
        """The windows of one split `[n, window]`, and how many of `texts` went into it."""
        count = tokens // self.window_tokens
        if self.pairs is not None:
            return self._paired(texts, count, split), count
        body = self.window_tokens - len(self.prefix)
        stream, used = self.stream(texts, count * body)
        if len(stream) < count * body:
            windows = len(stream) // body
            raise DataError(
                f"{self.source}: the {split} split needs {count * self.window_tokens:,} tokens, "
                f"but its {len(texts):,} documents hold {windows * self.window_tokens:,}; lower "
                f"{self._key(split)}, {self._remedy(split)}, or give more text"
            )
        return self.rows(stream, count), used

    def _paired(self, texts: Sequence[str], count: int, split: str) -> Tensor:
        """The first `count` texts, a row each."""
        assert self.pairs is not None
        if len(texts) < count:
            raise DataError(
                f"{self.source}: the {split} split needs {count:,} sources with their targets, one "
                f"for {self.window_tokens} of its tokens, but {len(texts):,} are left for it; "
                f"lower {self._key(split)}, {self._remedy(split)}, or give more text"
            )
        return self.pairs.rows(texts[:count], self.window_tokens)

    def stream(self, texts: Sequence[str], needed: int) -> tuple[list[int], int]:
        """At least `needed` tokens of `texts` where there are so many, and how many were used."""
        stream: list[int] = []
        used = 0
        while len(stream) < needed and used < len(texts):
            chunk = list(texts[used : used + _DOCUMENTS_AT_ONCE])
            encoded = self.tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
            for ids in encoded:
                stream += ids
                if self.tokenizer.eos_token_id is not None:
                    stream.append(self.tokenizer.eos_token_id)
                used += 1
                if len(stream) >= needed:
                    break
        return stream, used

    def rows(self, stream: Sequence[int], count: int) -> Tensor:
        """The first `count` windows of a stream."""
        body = self.window_tokens - len(self.prefix)
        rows = torch.tensor(stream[: count * body], dtype=torch.int64).reshape(count, body)
        opening = torch.tensor(self.prefix, dtype=torch.int64).expand(count, len(self.prefix))
        return torch.cat([opening, rows], dim=1)

    def _key(self, split: str) -> str:
        return self.fit_key if split == "fit" else f"{split}_tokens"

    @staticmethod
    def _remedy(split: str) -> str:
        return "raise heldout_fraction" if split == "heldout" else "lower heldout_fraction"
