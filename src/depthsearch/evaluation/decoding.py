"""Greedy decoding of a batch of prompts with a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def decode_greedily(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Sequence[int]
) -> tuple[list[list[int]], int]:
    """What `model` writes after each of `prompts`, without the tokens `ends`, and the passes made.

    Shorter prompts are padded on the left. The first pass takes all prompts, each further one a
    token of every row, until each row has ended or has `max_new_tokens` tokens. The token of the
    highest logit is taken, whatever else the model's own settings for generation ask for.
    """
    device = next(model.parameters()).device
    ids, mask = (part.to(device) for part in _padded_left(prompts))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    stops = torch.tensor(list(ends), dtype=torch.long, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache: Any = None
    written: list[Tensor] = []
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        chosen = output.logits[:, -1].float().argmax(-1).to(device)
        written.append(chosen)
        ended = ended | torch.isin(chosen, stops)
        if bool(ended.all()):
            break
        ids, positions = chosen.unsqueeze(-1), positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=-1)
    rows = torch.stack(written, dim=-1).tolist()
    return [_until(row, set(ends)) for row in rows], len(written)


def _padded_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids `[prompt, longest]`, and a mask of the same shape with ones at what is no padding."""
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _until(row: Sequence[int], ends: set[int]) -> list[int]:
    stop = next((place for place, token in enumerate(row) if token in ends), len(row))
    return list(row[:stop])
