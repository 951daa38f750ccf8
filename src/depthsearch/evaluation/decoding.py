"""Greedy decoding of a batch of prompts with a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    ids, mask = (part.to(device) for part in _padded(prompts, left=True))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def step(tokens: Tensor | None, cache: Any) -> Any:
        nonlocal positions, mask
        if tokens is not None:
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=-1)
        return model(
            input_ids=ids if tokens is None else tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    return _decoded(step, device, len(prompts), max_new_tokens, ends)


@torch.no_grad()
def translate_greedily(
    model: Any,
    sources: Sequence[Sequence[int]],
    starts: Sequence[int],
    max_new_tokens: int,
    ends: Sequence[int],
) -> tuple[list[list[int]], int]:
    """As `decode_greedily`, for an encoder-decoder that reads `sources` once.

    What it writes begins with the tokens `starts`, which are not part of the answer and don't
    count as new. Shorter sources are padded on the right.
    """
    device = next(model.parameters()).device
    ids, mask = (part.to(device) for part in _padded(sources, left=False))
    ids = torch.where(mask.bool(), ids, int(model.config.pad_token_id))
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)[0]
    first = torch.tensor(list(starts), device=device).expand(len(sources), -1)

    def step(tokens: Tensor | None, cache: Any) -> Any:
        return model(
            encoder_outputs=(encoded,),
            attention_mask=mask,
            decoder_input_ids=first if tokens is None else tokens,
            past_key_values=cache,
            use_cache=True,
        )

    return _decoded(step, device, len(sources), max_new_tokens, ends)


def _decoded(
    step: Callable[[Tensor | None, Any], Any],
    device: torch.device,
    rows: int,
    max_new_tokens: int,
    ends: Sequence[int],
) -> tuple[list[list[int]], int]:
    """What `step(tokens, cache)` has each row write; the first one is given neither."""
    stops = torch.tensor(list(ends), dtype=torch.long, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    written: list[Tensor] = []
    tokens, cache = None, None
    for _ in range(max_new_tokens):
        output = step(tokens, cache)
        cache = output.past_key_values
        chosen = output.logits[:, -1].float().argmax(-1).to(device)
        written.append(chosen)
        ended = ended | torch.isin(chosen, stops)
        if bool(ended.all()):
            break
        tokens = chosen.unsqueeze(-1)
    found = torch.stack(written, dim=-1).tolist()
    return [_until(row, set(ends)) for row in found], len(written)


def _padded(prompts: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids `[prompt, longest]`, and a mask of the same shape with ones at what is no padding."""
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt) if left else 0
        ids[row, start : start + len(prompt)] = torch.tensor(list(prompt))
        mask[row, start : start + len(prompt)] = 1
    return ids, mask


def _until(row: Sequence[int], ends: set[int]) -> list[int]:
    stop = next((place for place, token in enumerate(row) if token in ends), len(row))
    return list(row[:stop])
