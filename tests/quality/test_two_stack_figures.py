"""Figures of encoder-decoders: losses of targets, caches of both stacks, and their speed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.tiny_models import ENCODER_DECODER_TYPES, paired_ids, save_tiny, tiny_model

from depthsearch.errors import DataError
from depthsearch.quality import measure_speed, peak_memory, perplexity
from depthsearch.quality.size import kv_bytes_per_token

TARGETS = (12, 15, 15)
"""Scored tokens of `paired_ids`, whose first row is padded behind its target."""


@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_targets_are_scored_up_to_their_end(model_type: str) -> None:
    model, rows = tiny_model(model_type), paired_ids()
    read, written = rows.chunk(2, dim=1)
    expected = []
    for row, count in enumerate(TARGETS):
        # Without its padding a source and its target stand for themselves.
        source = read[row, : 12 if row == 0 else 16].unsqueeze(0)
        with torch.no_grad():
            logits = model(
                input_ids=source, decoder_input_ids=written[row : row + 1, :count], use_cache=False
            ).logits[0]
        expected.append(F.cross_entropy(logits, written[row, 1 : count + 1]).item())
    found = perplexity(model, rows, batch_tokens=40)
    assert found.losses == pytest.approx(expected, rel=1e-5)
    assert found.tokens == sum(TARGETS)
    tokens = sum(count * loss for count, loss in zip(TARGETS, expected, strict=True))
    assert found.loss_nats == pytest.approx(tokens / sum(TARGETS), rel=1e-5)
    assert found.value == pytest.approx(math.exp(found.loss_nats))
    assert found.loss_nats != pytest.approx(sum(expected) / 3, rel=1e-4)
    assert "targets of at most 16 tokens behind sources of as many" in found.protocol


def test_more_padding_changes_nothing() -> None:
    model, rows = tiny_model("bart"), paired_ids()[:1]
    padding = torch.zeros(1, 2, dtype=torch.int64)
    padded = torch.cat([rows[:, :16], padding, rows[:, 16:], padding], dim=1)
    assert perplexity(model, padded).losses == pytest.approx(
        perplexity(model, rows).losses, rel=1e-5
    )


@pytest.mark.parametrize("rows", [paired_ids()[:, :31], torch.zeros(2, 8, dtype=torch.int64)])
def test_rows_without_targets_are_refused(rows: torch.Tensor) -> None:
    with pytest.raises(DataError, match="two equal halves, with a target in the second"):
        perplexity(tiny_model("t5"), rows)


def test_the_standard_error_is_that_of_a_ratio() -> None:
    """Resampled windows have a mean that varies as the error says."""
    model = tiny_model("t5")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 300, (60, 32), generator=generator)
    for row, end in enumerate(torch.randint(2, 17, (60,), generator=generator).tolist()):
        rows[row, 16 + end :] = 0
    found = perplexity(model, rows)
    losses = torch.tensor(found.losses, dtype=torch.float64)
    counts = (rows[:, 17:] != 0).sum(1).double()
    drawn = torch.randint(60, (4000, 60), generator=generator)
    means = (losses * counts)[drawn].sum(1) / counts[drawn].sum(1)
    assert found.stderr == pytest.approx(means.std().item(), rel=0.1)


@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_the_cache_holds_what_is_read_and_what_is_written(model_type: str) -> None:
    # Three blocks to write with, keys and values of 64 numbers, of both attentions.
    assert kv_bytes_per_token(tiny_model(model_type)) == 3 * 2 * 2 * 64 * 4


@pytest.mark.parametrize("model_type", ["t5", "marian"])
def test_a_source_is_read_once_and_written_token_by_token(model_type: str) -> None:
    model = tiny_model(model_type)
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for name in ("encoder", "decoder"):
        getattr(model, f"get_{name}")().register_forward_pre_hook(
            lambda _m, _a, kwargs, name=name: shapes.append(
                (name, tuple(kwargs["input_ids"].shape))
            ),
            with_kwargs=True,
        )
    (speed,) = measure_speed({"a": model}, 10, 3, batch=2, repeats=1).values()
    turn = [("encoder", (2, 10)), *[("decoder", (2, 1))] * 4]
    assert shapes == turn * 2
    assert speed.prefill_tokens_per_s == pytest.approx(20e3 / speed.prefill.median_ms)
    assert speed.decode.min_ms > 0


def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "t5")
    found = peak_memory(tmp_path / "model", 8, 2, dtype="float32", device="cpu")
    assert found.peak_bytes > found.baseline_bytes > 0
