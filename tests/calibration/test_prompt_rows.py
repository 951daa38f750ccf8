"""Rows of prompts with their targets, for decoder-only models."""

from __future__ import annotations

import pytest
from tests.tiny_models import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from depthsearch.calibration.parallel import Pair, ParallelText
from depthsearch.calibration.prompt_rows import prompt_rows
from depthsearch.errors import DataError

TARGETS = {
    f"the mask keeps {number}": " ".join(["drops"] * (number % 4 + 1)) for number in range(12)
}


def pairs_of(template: str = "{source}\n", chat: bool = False) -> dict[str, Pair]:
    return ParallelText(TARGETS, "pairs").prompted(template, tiny_tokenizer(), chat)[1]


@pytest.mark.parametrize(("template", "chat"), [("{source}\n", False), ("say {source}", True)])
def test_a_row_is_prompt_target_and_end_and_all_but_the_prompt_counts(
    template: str, chat: bool
) -> None:
    tokenizer = tiny_tokenizer()
    ids, scored = prompt_rows(pairs_of(template, chat), tokenizer, 64, 10_000)
    assert ids.shape == scored.shape
    assert len(ids) == len(TARGETS)
    for row, which, pair in zip(ids, scored, pairs_of(template, chat).values(), strict=True):
        prompt, target = (tokenizer(t)["input_ids"] for t in (pair.prompt, pair.reference))
        whole = [*prompt, *target, tokenizer.eos_token_id]
        assert row.tolist() == whole + [0] * (ids.shape[1] - len(whole))
        assert row[which].tolist() == whole[len(prompt) :]


def test_rows_are_as_long_as_the_longest_and_hold_so_many_tokens_together() -> None:
    tokenizer = tiny_tokenizer()
    every, scored = prompt_rows(pairs_of(), tokenizer, 64, 10_000)
    lengths = [int(row.nonzero().max()) + 1 for row in scored]
    assert every.shape[1] == max(lengths)
    some, _ = prompt_rows(pairs_of(), tokenizer, 64, sum(lengths[:5]))
    assert some.tolist() == every[:5, : max(lengths[:5])].tolist()
    assert len(prompt_rows(pairs_of(), tokenizer, 64, sum(lengths[:5]) - 1)[0]) == 4
    assert len(prompt_rows(pairs_of(), tokenizer, 64, 1)[0]) == 1


def test_a_token_of_both_counts_as_target() -> None:
    tokenizer = tiny_tokenizer()
    prompt, target = "the mask ", "keeps"
    ids, scored = prompt_rows({prompt + target: Pair(prompt, target)}, tokenizer, 64, 100)
    assert tokenizer.decode(ids[0][scored[0]]) == " keeps</s>"


def test_what_the_tokenizer_puts_before_a_text_opens_every_row_once() -> None:
    tokenizer = tiny_tokenizer()
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    plain, which = prompt_rows(pairs_of(), tiny_tokenizer(), 64, 10_000)
    ids, scored = prompt_rows(pairs_of(), tokenizer, 64, 10_000)
    assert ids[:, 0].tolist() == [start] * len(ids)
    assert ids[:, 1:].tolist() == plain.tolist()
    assert scored[:, 1:].tolist() == which.tolist()
    with_start = {f"<s>{t}": Pair(f"<s>{p.prompt}", p.reference) for t, p in pairs_of().items()}
    assert prompt_rows(with_start, tokenizer, 64, 10_000)[0].tolist() == ids.tolist()


def test_the_first_token_never_counts() -> None:
    _, scored = prompt_rows({"keeps drops": Pair("", "keeps drops")}, tiny_tokenizer(), 64, 100)
    assert scored[0].tolist()[0] is False
    assert bool(scored[0, 1:].all())


def test_long_targets_are_cut_off_and_prompts_that_leave_no_room_are_told() -> None:
    tokenizer = tiny_tokenizer()
    whole, scored = prompt_rows(pairs_of(), tokenizer, 64, 10_000)
    prompt = int(scored[11].nonzero().min())
    cut, which = prompt_rows(pairs_of(), tokenizer, prompt + 1, 10_000)
    assert cut.tolist() == whole[:, : prompt + 1].tolist()
    assert int(which[11].sum()) == 1
    with pytest.raises(DataError, match=r"of 12 prompts leave no room .* raise calibration.window"):
        prompt_rows(pairs_of(), tokenizer, prompt, 10_000)
