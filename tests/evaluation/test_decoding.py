from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import MODEL_TYPES, keeping, tiny_ids, tiny_model

from depthsearch.evaluation.decoding import decode_greedily
from depthsearch.model.anatomy import describe
from depthsearch.model.switches import masked

MASKS = ("11 11 11 11", "01 11 10 11", "00 10 11 01", "11 01 00 00")
NEW = 14


def prompts(seed: int = 0) -> list[list[int]]:
    """Three prompts of different lengths, longer than a sliding window of 8 tokens and shorter."""
    rows = tiny_ids(3, 12, seed).tolist()
    return [rows[0], rows[1][:5], rows[2][:9]]


def without_cache(model: Any, prompt: list[int], ends: set[int]) -> list[int]:
    """One row alone: the whole text is read again for every token, without padding or cache."""
    ids = list(prompt)
    for _ in range(NEW):
        with torch.no_grad():
            token = int(
                model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
            )
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_padded_batch_with_a_cache_writes_what_each_prompt_alone_would(model_type: str) -> None:
    model = tiny_model(model_type)
    anatomy = describe(model)
    for key in MASKS:
        with masked(model, anatomy, keeping(key)):
            endless = [without_cache(model, prompt, set()) for prompt in prompts()]
            # A token that some row writes ends rows at different places, or not at all.
            ends = {endless[0][NEW // 2], 2}
            wanted = [without_cache(model, prompt, ends) for prompt in prompts()]
            found, passes = decode_greedily(model, prompts(), NEW, sorted(ends))
        assert found == wanted
        assert passes == min(NEW, 1 + max(map(len, wanted)))


def test_it_is_what_transformers_generates() -> None:
    model = tiny_model("llama")
    rows = prompts(seed=3)
    ids = torch.tensor([[0] * (12 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (12 - len(row)) + [1] * len(row) for row in rows])
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    found, _ = decode_greedily(model, rows, NEW, [2])
    for row, written in zip(whole[:, 12:].tolist(), found, strict=True):
        assert written == row[: row.index(2) if 2 in row else None]


def test_settings_of_the_model_that_are_not_greedy_change_nothing() -> None:
    model = tiny_model("llama")
    before = decode_greedily(model, prompts(), NEW, [])
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, max_length=3)
    assert decode_greedily(model, prompts(), NEW, []) == before


def test_it_stops_when_every_row_has_ended() -> None:
    model = tiny_model("llama")
    endless, passes = decode_greedily(model, prompts(), NEW, [])
    assert passes == NEW
    assert [len(row) for row in endless] == [NEW] * 3
    firsts = sorted({row[0] for row in endless})
    assert decode_greedily(model, prompts(), NEW, firsts) == ([[], [], []], 1)
