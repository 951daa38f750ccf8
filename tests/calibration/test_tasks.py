from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny_models import tiny_ids, tiny_model, tiny_tokenizer

from depthsearch.calibration.parallel import Pair
from depthsearch.calibration.tasks import Task, continuation_task, pair_task
from depthsearch.errors import DataError

PAIRS = [Pair("the mask", "die Maske"), Pair("keeps some of the blocks", "behält einige Blöcke")]


def task_of(lengths: list[int], new_tokens: int = 4) -> Task:
    prompts = tuple(tuple(range(length)) for length in lengths)
    return Task(prompts, None, new_tokens, (2,), None)


def test_a_continuation_starts_after_the_first_half_of_a_window() -> None:
    windows = tiny_ids(3, 9)
    task = continuation_task(windows, tiny_model("llama"), tiny_tokenizer(), 5)
    assert torch.tensor(task.prompts).equal(windows[:, :4])
    assert task.references is None
    assert task.ends == (2,)


@pytest.mark.parametrize(
    ("lengths", "batch_tokens", "wanted"),
    [
        ([6, 6, 6], 20, [[0, 1], [2]]),
        ([6, 6, 6], 5, [[0], [1], [2]]),
        # A long prompt widens the rows that are already there.
        ([2, 2, 6, 2], 20, [[0, 1], [2, 3]]),
        ([2, 2, 2, 6], 40, [[0, 1, 2, 3]]),
    ],
)
def test_batches_count_every_row_as_its_longest(
    lengths: list[int], batch_tokens: int, wanted: list[list[int]]
) -> None:
    assert [list(batch) for batch in task_of(lengths).batches(batch_tokens)] == wanted


def test_a_prompt_is_opened_as_the_tokenizer_opens_texts_but_once(make_tokenizer: Any) -> None:
    tokenizer, model = make_tokenizer(adds_bos=True), tiny_model("llama")
    pairs = [Pair("w1 w2", "w3"), Pair("<bos> w1", "w4")]
    task = pair_task(pairs, model, tokenizer, 5)
    assert task.prompts == ((2, 5, 6), (2, 5))
    assert task.references == ("w3", "w4")
    # <eos> of the tokenizer is 3, that of the model 2.
    assert task.ends == (2, 3)
    assert task.texts([[5, 3], []]) == ("w1", "")


def test_a_task_is_another_where_anything_asked_for_is() -> None:
    task = pair_task(PAIRS, tiny_model("llama"), tiny_tokenizer(), 5)
    others = [
        replace(task, prompts=task.prompts[::-1]),
        replace(task, references=("die Maske", "")),
        replace(task, references=None),
        replace(task, max_new_tokens=6),
        replace(task, ends=(1,)),
    ]
    assert len({one.fingerprint for one in (task, *others)}) == 6
    assert replace(task).fingerprint == task.fingerprint


def test_what_does_not_fit_into_the_context_is_refused() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    continuation_task(tiny_ids(1, 128), model, tokenizer, 64)
    with pytest.raises(DataError, match=r"64 tokens and .* = 65 .* context of 128 .*window_tokens"):
        continuation_task(tiny_ids(1, 128), model, tokenizer, 65)
    with pytest.raises(DataError, match=r"leave long texts out"):
        pair_task([Pair("zebra " * 90, "x")], model, tokenizer, 5)
