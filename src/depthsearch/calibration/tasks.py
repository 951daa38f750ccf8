"""What a model is asked to write, and what the text is held against."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from depthsearch.calibration.pair_rows import PairRows
from depthsearch.calibration.parallel import Pair
from depthsearch.calibration.windows import opened, opening_tokens
from depthsearch.errors import DataError
from depthsearch.model.anatomy import context_window


@dataclass(frozen=True)
class Task:
    """Prompts as token ids, each to be continued by at most `max_new_tokens` tokens.

    A continuation ends before the first of the tokens `ends`. `references` holds one text a
    prompt; None stands for what the dense model itself writes. `tokenizer` turns ids into text.
    An encoder-decoder reads the prompt and writes a text of its own, behind the tokens `starts`.
    """

    prompts: tuple[tuple[int, ...], ...]
    references: tuple[str, ...] | None
    max_new_tokens: int
    ends: tuple[int, ...]
    tokenizer: Any = field(repr=False, compare=False)
    starts: tuple[int, ...] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of all that decides what is asked for and what it is held against."""
        parts: tuple[Any, ...] = (self.prompts, self.references, self.max_new_tokens, self.ends)
        if self.starts is not None:
            parts += (self.starts,)
        return hashlib.sha256(repr(parts).encode("utf-8", errors="surrogatepass")).hexdigest()

    def batches(self, batch_tokens: int) -> tuple[range, ...]:
        """The prompts in order, in batches that take at most `batch_tokens` tokens when written.

        Prompts count as the longest of their batch, with all new tokens; a batch has one at least.
        """
        found: list[range] = []
        start, widest = 0, 0
        for place, prompt in enumerate(self.prompts):
            wider = max(widest, len(prompt))
            if place > start and (place + 1 - start) * (wider + self.max_new_tokens) > batch_tokens:
                found.append(range(start, place))
                start, wider = place, len(prompt)
            widest = wider
        return (*found, range(start, len(self.prompts)))

    def texts(self, written: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """What continuations of token ids say."""
        decode = self.tokenizer.decode
        return tuple(str(decode(list(ids), skip_special_tokens=True)) for ids in written)


def continuation_task(windows: Tensor, model: Any, tokenizer: Any, max_new_tokens: int) -> Task:
    """The first half of each window `[n, window]`, held against the dense model's continuation.

    Raises DataError where that does not fit into the model's context.
    """
    prompts = tuple(map(tuple, windows[:, : windows.shape[1] // 2].tolist()))
    return _fitting(prompts, None, model, tokenizer, max_new_tokens)


def pair_task(pairs: Sequence[Pair], model: Any, tokenizer: Any, max_new_tokens: int) -> Task:
    """The prompts of `pairs`, held against their references.

    Tokens that the tokenizer itself puts before a text open every prompt, unless it has them.
    Raises DataError where a prompt does not fit into the model's context.
    """
    opening = opening_tokens(tokenizer)
    texts = [pair.prompt for pair in pairs]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    prompts = tuple(opened(ids, opening) for ids in encoded)
    references = tuple(pair.reference for pair in pairs)
    return _fitting(prompts, references, model, tokenizer, max_new_tokens)


def translation_task(
    rows: PairRows, texts: Sequence[str], window_tokens: int, max_new_tokens: int
) -> Task:
    """The sources of `texts`, for an encoder-decoder, held against their targets.

    Sources of more than `window_tokens` tokens are cut off, as in the rows that losses are taken
    on. Raises DataError where an answer does not fit into the model's context.
    """
    room = context_window(rows.model)
    if room is not None and max_new_tokens + len(rows.starts) > room:
        raise DataError(
            f"objective.max_new_tokens = {max_new_tokens:,} do not fit into the model's context of "
            f"{room:,} tokens: lower it"
        )
    return Task(
        rows.sources(texts, window_tokens),
        tuple(rows.pairs[text].reference for text in texts),
        max_new_tokens,
        _end_tokens(rows.model, rows.tokenizer),
        rows.tokenizer,
        rows.starts,
    )


def _fitting(
    prompts: tuple[tuple[int, ...], ...],
    references: tuple[str, ...] | None,
    model: Any,
    tokenizer: Any,
    max_new_tokens: int,
) -> Task:
    ends = _end_tokens(model, tokenizer)
    task = Task(prompts, references, max_new_tokens, ends, tokenizer)
    if not min(map(len, prompts)):
        raise DataError("a prompt has no tokens: give calibration.prompt some text of its own")
    room = context_window(model)
    if room is not None and task.longest + max_new_tokens > room:
        shorter = "window_tokens" if references is None else "prompt, or leave long texts out"
        raise DataError(
            f"a prompt of {task.longest:,} tokens and objective.max_new_tokens = "
            f"{max_new_tokens:,} more do not fit into the model's context of {room:,} tokens: "
            f"lower max_new_tokens, or shorten calibration.{shorter}"
        )
    return task


def _end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text, by the model's settings for generation and the tokenizer."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), model.config, tokenizer):
        ends = getattr(holder, "eos_token_id", None)
        if ends is not None:
            found.update(ends if isinstance(ends, list | tuple) else [ends])
    return tuple(sorted(found))
