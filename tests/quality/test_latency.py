from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny_models import MODEL_TYPES, tiny_model
from torch import nn

from depthsearch.errors import ModelError
from depthsearch.model.anatomy import describe
from depthsearch.model.families import FAMILIES
from depthsearch.quality import latency
from depthsearch.quality.latency import Times, measure_parts, measure_steps

CONTEXT = 20
ATTENTION, FFN, ATTENTION_NORM, FFN_NORM, SHARED_NORM, EMBEDDING, HEAD = (
    100_000, 3_000, 40, 50, 60, 7_000_000, 800_000_000,
)  # fmt: skip


class Clockwork:
    """A clock that only modules move, each by as much as it is said to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 0
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter_ns=lambda: self.now_ns))

    def takes(self, module: nn.Module, ns: int) -> None:
        def move(*_: Any) -> None:
            self.now_ns += ns

        module.register_forward_hook(move)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clockwork:
    return Clockwork(monkeypatch)


def slowed(model_type: str, clock: Clockwork) -> Any:
    """A model whose parts take known times: in block b, attention and FFN b ns more each."""
    model, row = tiny_model(model_type), FAMILIES[model_type]
    for index, block in enumerate(describe(model).block_list(model)):
        clock.takes(getattr(block, row.attention), ATTENTION + index)
        clock.takes(getattr(block, row.ffn), FFN + index)
        for names, ns in (
            (row.attention_norms, ATTENTION_NORM),
            (row.ffn_norms, FFN_NORM),
            (row.shared_norms, SHARED_NORM),
        ):
            for name in names:
                clock.takes(getattr(block, name), ns)
    clock.takes(model.get_input_embeddings(), EMBEDDING)
    clock.takes(model.get_output_embeddings(), HEAD)
    return model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_part_gets_the_time_that_its_modules_take(model_type: str, clock: Clockwork) -> None:
    model, row = slowed(model_type, clock), FAMILIES[model_type]
    found = measure_parts(model, describe(model), CONTEXT, repeats=2)
    attention = ATTENTION + ATTENTION_NORM * len(row.attention_norms)
    ffn = FFN + FFN_NORM * len(row.ffn_norms)
    expected = [part + block for block in range(4) for part in (attention, ffn)]
    assert [times.median_ns for times in found.sites] == expected
    shared = [SHARED_NORM] * 4 if row.parallel else []
    assert [times.median_ns for times in found.shared] == shared
    assert found.fixed == Times(EMBEDDING + HEAD, EMBEDDING + HEAD, EMBEDDING + HEAD)
    assert found.whole.median_ns == found.fixed.median_ns + sum(expected) + sum(shared)
    assert found.shared_costs == tuple(shared)


def test_sites_that_are_alike_cost_alike(clock: Clockwork) -> None:
    model = slowed("gemma2", clock)  # its second block attends to all, the others to 8 tokens
    found = measure_parts(model, describe(model), CONTEXT, repeats=1)
    attention, ffn = ATTENTION + 2 * ATTENTION_NORM, FFN + 2 * FFN_NORM
    sliding = round(attention + (0 + 2 + 3) / 3)
    assert found.site_costs[::2] == (sliding, attention + 1, sliding, sliding)
    assert found.site_costs[1::2] == (round(ffn + 1.5),) * 4
    assert (
        measure_parts(model, describe(model), 4, repeats=1).site_costs[::2]
        == (round(attention + 1.5),) * 4
    )


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_every_step_is_the_same_and_a_real_one(model_type: str) -> None:
    model = tiny_model(model_type)
    lengths: list[int] = []
    seen: list[torch.Tensor] = []
    answers: list[torch.Tensor] = []

    def before(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["past_key_values"] is not None:
            lengths.append(kwargs["past_key_values"].get_seq_length())
            seen.append(kwargs["input_ids"])

    def after(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs["past_key_values"] is not None and kwargs["input_ids"].shape[1] == 1:
            answers.append(output.logits[0, -1].clone())

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)
    measure_parts(model, describe(model), CONTEXT, repeats=2)
    assert lengths == [CONTEXT] * 10
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    prompt = torch.arange(CONTEXT).view(1, -1)
    logits = model(input_ids=prompt, past_key_values=None, use_cache=False).logits
    token = logits[:, -1:].argmax(dim=-1)
    assert torch.equal(seen[0], token)
    whole = model(input_ids=torch.cat((prompt, token), 1), past_key_values=None, use_cache=False)
    torch.testing.assert_close(answers[0], whole.logits[0, -1], atol=1e-4, rtol=1e-4)


def test_a_long_context_is_filled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(latency, "_PREFILL_TOKENS", 8)
    pieces: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, args, __: pieces.append(tuple(args[0].shape))
    )
    measure_steps({"model": model}, CONTEXT, repeats=1)
    assert pieces == [(1, 8), (1, 8), (1, 4), *[(1, 1)] * 4]


def test_real_times_have_the_shape_of_the_model() -> None:
    model = tiny_model("cohere")
    rounds: list[tuple[int, int]] = []
    found = measure_parts(
        model, describe(model), CONTEXT, 4, on_steps=lambda *call: rounds.append(call)
    )
    assert rounds == [(turn, 7) for turn in range(1, 8)]
    assert (len(found.sites), len(found.shared), len(found.alike)) == (8, 4, 8)
    assert len(set(found.alike)) == 2
    for times in (*found.sites, *found.shared, found.fixed, found.whole):
        assert 0 < times.low_ns <= times.median_ns <= times.high_ns
    assert 0 <= found.interrupted <= 1
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_slower_sublayer_is_found_slower() -> None:
    model = tiny_model("llama")
    block = describe(model).block_list(model)[2]
    block.get_submodule("mlp").register_forward_hook(lambda *_: time.sleep(0.05))
    found = measure_parts(model, describe(model), CONTEXT, repeats=3)
    assert found.sites[5].median_ns >= 50e6
    assert max(t.median_ns for i, t in enumerate(found.sites) if i != 5) < 50e6
    assert found.whole.median_ns >= 50e6


def test_models_take_turns(clock: Clockwork) -> None:
    models = {name: tiny_model("llama", blocks=blocks) for name, blocks in (("a", 4), ("b", 2))}
    order: list[str] = []
    for name, model in models.items():
        clock.takes(model.get_output_embeddings(), 10 if name == "a" else 30)
        model.get_output_embeddings().register_forward_hook(
            lambda *_, name=name: order.append(name)
        )
    found = measure_steps(models, CONTEXT, repeats=2)
    assert found == {"a": Times(10, 10, 10), "b": Times(30, 30, 30)}
    assert "".join(order[2:]) == "abbaabbaab"


def test_times_are_a_median_and_quartiles() -> None:
    assert Times.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Times(median_ns=3, low_ns=2, high_ns=4)


def test_interrupted_steps_count_only_where_few_others_remain() -> None:
    times = [[99.0]] * 3 + [[float(place)] for place in range(8)]
    flags = [False] * 3 + [True, False] * 4
    assert latency._undisturbed(times, flags)[:, 0].tolist() == list(range(8))
    flags = [True] * 3 + [True, False, True, False, False, False, True, False]
    assert latency._undisturbed(times, flags)[:, 0].tolist() == [1, 3, 4, 5, 7]


@pytest.mark.parametrize(
    ("context", "repeats", "message"),
    [
        (0, 1, "context_tokens is 0; allowed: 1 or more"),
        (8, 0, "repeats is 0; allowed: 1 or more"),
        (128, 1, "a context of 128 tokens and one more exceed the model's 128 positions"),
    ],
)
def test_what_can_not_be_measured(context: int, repeats: int, message: str) -> None:
    model = tiny_model("llama")
    calls: tuple[Callable[[], object], ...] = (
        lambda: measure_parts(model, describe(model), context, repeats),
        lambda: measure_steps({"it": model}, context, repeats),
    )
    for call in calls:
        with pytest.raises(ModelError, match=message):
            call()


def test_a_model_that_is_not_on_one_device_is_refused() -> None:
    with torch.device("meta"):
        head = nn.Linear(64, 300, bias=False)
    model = tiny_model("llama", tie_word_embeddings=False)
    model.lm_head = head
    with pytest.raises(ModelError, match="is on cpu, meta: steps are timed on one CPU or one CUDA"):
        measure_steps({"it": model}, 8, 1)


def test_hooks_go_also_after_an_error() -> None:
    model = tiny_model("llama")

    def fail(*_: Any) -> None:
        raise RuntimeError("out of order")

    measure_parts(model, describe(model), 8, repeats=1)
    ffn = describe(model).block_list(model)[1].get_submodule("mlp")
    steps = iter(range(5))
    handle = ffn.register_forward_hook(lambda *_: fail() if next(steps) == 3 else None)
    with pytest.raises(RuntimeError, match="out of order"):
        measure_parts(model, describe(model), 8, repeats=1)
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 CUDA device")
def test_parts_on_a_gpu_add_up_to_the_step() -> None:
    model = tiny_model("llama", blocks=12, hidden_size=256).to("cuda")
    found = measure_parts(model, describe(model), CONTEXT, repeats=30)
    parts = sum(found.site_costs) + found.fixed.median_ns
    assert min(found.site_costs) > 0
    assert parts == pytest.approx(found.whole.median_ns, rel=0.5)
