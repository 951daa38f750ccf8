"""Prompts with their targets as a decoder-only model reads them: a row of tokens each."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from depthsearch.calibration.parallel import Pair
from depthsearch.calibration.windows import opened, opening_tokens
from depthsearch.errors import DataError


def prompt_rows(
    pairs: Mapping[str, Pair], tokenizer: Any, window_tokens: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """Ids `[n, longest]` of the first texts of `pairs`, and a bool for each: part of the target?

    A text is a prompt with its target, and the end-of-text token where the tokenizer has one,
    which belongs to the target. Rows hold `window_tokens` tokens at most, what is longer is cut
    off; together they hold at most `tokens`, but there is one row in any case. What is shorter than
    the longest row is padded behind, where a model that reads from left to right does not see it.
    A token that is part prompt, part target counts as target; the first of a row never does.
    Raises DataError where a prompt leaves no room for a token of its target.
    """
    opening = opening_tokens(tokenizer)
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    rows: list[list[int]] = []
    starts: list[int] = []
    held = 0
    for text, pair in pairs.items():
        both = tokenizer([text, pair.prompt], add_special_tokens=False, verbose=False)["input_ids"]
        whole, prompt = (opened(ids, opening) for ids in both)
        same = takewhile(lambda two: two[0] == two[1], zip(whole, prompt, strict=False))
        start = sum(1 for _ in same)
        row = [*whole, *ends][:window_tokens]
        if rows and held + len(row) > tokens:
            break
        rows.append(row)
        starts.append(max(1, start))
        held += len(row)
    full = sum(len(row) <= start for row, start in zip(rows, starts, strict=True))
    if full:
        raise DataError(
            f"{full} of {len(rows)} prompts leave no room for their targets in {window_tokens} "
            "tokens: raise calibration.window_tokens, or leave long texts out"
        )
    longest = max(map(len, rows))
    ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    wanted = torch.zeros((len(rows), longest), dtype=torch.bool)
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
        wanted[place, start : len(row)] = True
    return ids, wanted
