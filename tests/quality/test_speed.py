from __future__ import annotations

import time

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from depthsearch.errors import ModelError
from depthsearch.quality import measure_speed, peak_memory
from depthsearch.quality.speed import Timing


def test_models_take_turns_and_the_rates_follow_from_the_times(tiny):
    model_a, model_b = tiny("llama"), tiny("gpt2")
    order = []
    for name, model in (("a", model_a), ("b", model_b)):
        model.get_input_embeddings().register_forward_hook(
            lambda _m, args, _o, name=name: order.append((name, tuple(args[0].shape)))
        )
    seen = []
    result = measure_speed(
        {"a": model_a, "b": model_b},
        prompt_tokens=10,
        new_tokens=2,
        batch=3,
        repeats=2,
        on_progress=lambda *step: seen.append(step),
    )
    turn = [(3, 10), (3, 1), (3, 1)]
    assert order == [(name, shape) for _ in range(3) for name in "ab" for shape in turn]
    assert seen == [(i, 6) for i in range(1, 7)]
    for speed in result.values():
        assert speed.prefill_tokens_per_s == pytest.approx(30e3 / speed.prefill.median_ms)
        assert speed.decode_tokens_per_s == pytest.approx(3e3 / speed.decode.median_ms)
        assert 0 < speed.prefill.min_ms <= speed.prefill.median_ms <= speed.prefill.max_ms
        assert 0 < speed.decode.min_ms <= speed.decode.median_ms <= speed.decode.max_ms
        assert "prompt=10, new=2, batch=3, median of 2 interleaved" in speed.protocol
        assert speed.peak_memory_bytes is None


def test_a_slower_model_is_found_slower(tiny):
    quick, slow = tiny("llama"), tiny("llama")
    slow.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    result = measure_speed({"quick": quick, "slow": slow}, 8, 2, repeats=3)
    assert result["slow"].prefill.min_ms >= 50
    assert result["slow"].decode.min_ms >= 50
    assert result["quick"].decode_tokens_per_s > result["slow"].decode_tokens_per_s


def test_timing_summarizes():
    assert Timing.of([3.0, 1.0, 2.0]) == Timing(median_ms=2.0, min_ms=1.0, max_ms=3.0)


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch", "repeats"])
def test_figures_below_one(name, tiny):
    with pytest.raises(ModelError, match=f"{name} is 0"):
        measure_speed({"a": tiny("llama")}, **{name: 0})


def test_more_tokens_than_positions(tiny):
    with pytest.raises(ModelError, match=r"a: 65 tokens .* exceed the model's 64 positions"):
        measure_speed({"a": tiny("gpt2")}, prompt_tokens=60, new_tokens=5)


def test_peak_memory_is_that_of_a_process_of_its_own(tiny, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, width in (("small", 48), ("large", 480_000)):
        tiny("llama", intermediate_size=width).save_pretrained(tmp_path / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
            tmp_path / name
        )
    ballast = torch.ones(1 << 28)  # 1 GiB here must not show up there
    small = peak_memory(tmp_path / "small", 8, 2, dtype="float32", device="cpu")
    assert ballast.untyped_storage().nbytes() == 1 << 30
    del ballast
    large = peak_memory(tmp_path / "large", 8, 2, dtype="float32", device="cpu")
    weights = 2 * 3 * 32 * 480_000 * 4
    assert small.device == "cpu"
    assert 0 < small.baseline_bytes < small.peak_bytes < 1 << 30
    assert weights * 0.8 < large.peak_bytes - small.peak_bytes < weights * 2.5


def test_peak_memory_of_what_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        peak_memory(tmp_path)


def test_peak_memory_of_nothing(tmp_path):
    with pytest.raises(ModelError, match="no such directory"):
        peak_memory(tmp_path / "absent")
