from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu.metrics.chrf import CHRF
from tests.evaluation.tiny_backends import tiny_backend
from tests.tiny_models import keeping, tiny_ids, tiny_loaded, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from depthsearch.calibration.parallel import Pair
from depthsearch.calibration.tasks import Task, continuation_task, pair_task
from depthsearch.evaluation import InProcess, Written, written
from depthsearch.export import export
from depthsearch.model.costs import cost_table, head_flops
from depthsearch.space import Mask, Status

NEW = 10
PACKABLE = "11 10 01 11"
REFERENCES = ["the search drops", "mask", "blocks the others keep", "some of", "drops drops"]
SOURCES = ["the mask keeps", "the", "others and the blocks of the search", "drops", "keeps some"]


def task_of(model: Any, *, pairs: bool) -> Task:
    """Prompts of different lengths with references, or halves of windows without."""
    if pairs:
        both = [Pair(a, b) for a, b in zip(SOURCES, REFERENCES, strict=True)]
        return pair_task(both, model, tiny_tokenizer(), NEW)
    return continuation_task(tiny_ids(5, 12), model, tiny_tokenizer(), NEW)


def generated(model: Any, prompts: Sequence[Sequence[int]], tokenizer: Any) -> list[str]:
    """What transformers itself generates greedily, prompt by prompt, so that nothing is padded."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
        texts.append(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def points_lost(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    metric = CHRF(word_order=2)
    return [
        100 - metric.sentence_score(text, [reference]).score
        for text, reference in zip(texts, references, strict=True)
    ]


def judge_of(model: Any) -> InProcess:
    return tiny_backend(model=model, batch_tokens=60)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_losses_are_those_of_what_the_export_generates(
    model_type: str, pairs: bool, tmp_path: Path
) -> None:
    loaded, anatomy = tiny_loaded(model_type)
    task = task_of(loaded.model, pairs=pairs)
    backend = Written(judge_of(loaded.model), task)
    export(loaded, anatomy, keeping(PACKABLE), tmp_path / "small", check=False)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    references = (
        REFERENCES if pairs else generated(loaded.model.eval(), task.prompts, tiny_tokenizer())
    )
    wanted = points_lost(generated(small.eval(), task.prompts, tokenizer), references)

    units = [backend.run(b, [keeping(PACKABLE)]) for b in range(len(backend.sequences))]

    assert sum(backend.sequences) == 5
    assert len(units) > 1
    found = [loss for unit in units for loss in unit.losses[0]]
    assert found == pytest.approx(wanted, abs=1e-9)
    assert max(found) > 0


def test_the_dense_model_loses_nothing_against_itself_and_something_against_references() -> None:
    model = tiny_model("llama")
    dense = Mask.dense(8)
    own = Written(judge_of(model), task_of(model, pairs=False))
    assert all(own.run(b, [dense]).losses == ((0.0,) * n,) for b, n in enumerate(own.sequences))
    given = Written(judge_of(model), task_of(model, pairs=True))
    assert min(given.run(0, [dense]).losses[0]) > 0


def test_a_loss_does_not_depend_on_the_other_masks_of_the_unit() -> None:
    model = tiny_model("llama")
    masks = [keeping(key) for key in (PACKABLE, "11 11 11 11", "01 11 11 10")]
    together = Written(judge_of(model), task_of(model, pairs=True)).run(1, masks)
    for place in (2, 0, 1):
        alone = Written(judge_of(model), task_of(model, pairs=True)).run(1, [masks[place]])
        assert alone.losses == together.losses[place : place + 1]
        assert alone.costs == together.costs[place : place + 1]


def test_cost_counts_every_token_that_is_put_through() -> None:
    model = tiny_model("llama")
    judge = judge_of(model)
    task = task_of(model, pairs=True)
    backend = Written(judge, task)
    mask = keeping(PACKABLE)
    flops = cost_table(model, judge.replayer.anatomy, judge.window_tokens).of("flops").sites
    kept = sum(cost for cost, keep in zip(flops, mask.keep, strict=True) if keep)
    head = head_flops(model)
    for batch, places in enumerate(task.batches(60)):
        rows, longest = len(places), max(len(task.prompts[place]) for place in places)
        _, passes = backend.texts(batch, mask)
        # The first pass takes the prompts, each further one a token of every row.
        tokens = rows * (longest + passes - 1)
        cost = (tokens * kept + rows * passes * head) / (sum(flops) + head)
        unit = backend.run(batch, [mask, mask])
        assert unit.costs == pytest.approx([cost, cost], rel=1e-12)
        assert unit.cost_tokens == pytest.approx(2 * cost, rel=1e-12)
        assert unit.cost_tokens <= backend.unit_cost(batch, [mask, mask]) * (1 + 1e-12)
    full = sum(backend.unit_cost(b, [mask]) for b in range(len(backend.sequences)))
    assert backend.plan([mask]) == pytest.approx(full, rel=1e-12)
    assert backend.window_tokens == max(map(len, task.prompts)) + NEW


def test_a_mask_whose_texts_end_early_costs_less_than_was_planned() -> None:
    model = tiny_model("llama")
    endless = task_of(model, pairs=True)
    backend = Written(judge_of(model), endless)
    dense = Mask.dense(8)
    # Ending with every token there is, each text is empty after one pass.
    ended = Task(endless.prompts, endless.references, NEW, tuple(range(300)), endless.tokenizer)
    short = Written(judge_of(model), ended).run(0, [dense])
    assert short.losses == ((100.0,) * backend.sequences[0],)
    assert short.cost_tokens < backend.plan([dense])
    assert short.cost_tokens < backend.run(0, [dense]).cost_tokens


def test_references_of_its_own_are_prepared_and_hints_take_the_windows() -> None:
    model = tiny_model("llama")
    judge = judge_of(model)
    own = Written(judge, task_of(model, pairs=False))
    given = Written(judge, task_of(model, pairs=True))
    assert given.preparation == 0.0
    assert own.preparation == own.plan([Mask.dense(8)])
    assert own.prepare([keeping(PACKABLE)]) == 0.0
    for ours, theirs in (
        (own.hints(), judge.hints()),
        (own.sensitivity(), judge.sensitivity()),
    ):
        assert ours[0] == theirs[0]
    # All batches of windows are among the first four, so that only hints record them.
    assert own.hints()[1] == pytest.approx(judge.hints()[1] + judge.preparation, rel=1e-12)
    assert own.sensitivity()[1] == judge.sensitivity()[1]


def test_a_mask_that_memory_does_not_suffice_for_is_quarantined_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    backend = Written(judge_of(model), task_of(model, pairs=True))
    real, calls = written.decode_greedily, [0]

    def scarce(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(*given)

    masks = [keeping(key) for key in (PACKABLE, "01 11 11 10", "11 11 11 11")]
    wanted = backend.run(0, masks)
    monkeypatch.setattr(written, "decode_greedily", scarce)
    found = backend.run(0, masks)
    assert found.statuses == (Status.OK, Status.OUT_OF_MEMORY, Status.OK)
    assert found.losses == (wanted.losses[0], (), wanted.losses[2])
    assert found.costs == (wanted.costs[0], 0.0, wanted.costs[2])
    monkeypatch.setattr(written, "decode_greedily", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backend.run(0, masks)
