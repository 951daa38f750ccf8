"""Magnitude compensation: that it is Prune&Comp's, seen from behind the gap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.evaluation.tiny_backends import tiny_backend
from tests.tiny_models import keeping, tiny_ids, tiny_model
from torch import Tensor

from depthsearch.errors import DataError, UnsupportedModelError
from depthsearch.evaluation import Rescaled
from depthsearch.model.families import FAMILIES
from depthsearch.model.repair import Patch, patched, projection_of
from depthsearch.model.replay import Mode
from depthsearch.model.switches import masked
from depthsearch.space import Mask

SITES = 8
FIT = tiny_ids(20, 12, seed=7).clamp_min(3)
"""Without padding, whose embedding is zero."""

RESCALED = [name for name, row in FAMILIES.items() if row.norm_before]


def rescaled(family: str) -> tuple[Rescaled, Any]:
    """With norms whose epsilons are nothing beside the streams of so small a model."""
    model = tiny_model(family)
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 1e-12)
    judge = tiny_backend(model=model)
    return Rescaled(judge, FIT), judge


def streams(judge: Any, mask: Mask, factors: dict[int, float] | None = None) -> list[Tensor]:
    """The stream `[batch, seq, hidden]` before every block and behind the last.

    `factors` multiply it before blocks.
    """
    hidden, calls = judge.replayer.entry(FIT)
    found = []
    for block, call in enumerate(calls):
        hidden = hidden * (factors or {}).get(block, 1.0)
        found.append(hidden)
        attention, ffn = mask.keep[2 * block : 2 * block + 2]
        hidden = judge.replayer.apply(call, block, hidden, attention=attention, ffn=ffn)
    return [*found, hidden]


def mean_ratio(above: Tensor, below: Tensor) -> float:
    return float((above.double().norm(dim=-1) / below.double().norm(dim=-1)).mean())


def weight_ratio(judge: Any, patch: Patch) -> float:
    """What the patch divides by."""
    anatomy = judge.replayer.anatomy
    projection = projection_of(judge.replayer.model, anatomy, anatomy.sites[patch.site])
    if projection.norm is None:
        old, new = projection.weight.double(), patch.weight.double()
    else:
        assert torch.equal(patch.weight, projection.weight)
        assert patch.norm is not None
        with patched(judge.replayer.model, anatomy, [patch]):
            new = projection.gains
        old = projection.gains
    return float((old * new).sum() / new.square().sum())


@pytest.mark.parametrize("family", RESCALED)
def test_logits_are_those_of_a_stream_multiplied_behind_each_gap(family: str) -> None:
    backend, judge = rescaled(family)
    mask = keeping("00 11 00 11")
    dense = streams(judge, Mask.dense(SITES))
    factors = {1: mean_ratio(dense[1], dense[0]), 3: mean_ratio(dense[3], dense[2])}
    assert min(factors.values()) > 1.01
    expected = streams(judge, mask, factors)[-1]
    with patched(judge.replayer.model, judge.replayer.anatomy, backend.repair(mask)):
        found = streams(judge, mask)[-1]
    torch.testing.assert_close(found * factors[1] * factors[3], expected, rtol=1e-4, atol=1e-4)
    cut = streams(judge, mask)[-1]
    logits = [judge.replayer.logits(hidden[0]) for hidden in (found, expected, cut)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert (logits[2] - logits[1]).norm() > 20 * (logits[0] - logits[1]).norm()


def test_it_is_what_scaling_all_that_writes_before_the_gap_gives() -> None:
    """The paper's own form, on a model whose embeddings are not tied to its head."""
    backend, judge = rescaled("llama")
    model, mask = judge.replayer.model, keeping("11 00 11 11")
    patches = backend.repair(mask)
    factor = weight_ratio(judge, patches[0])
    with (
        patched(model, judge.replayer.anatomy, patches),
        masked(model, judge.replayer.anatomy, mask),
    ):
        divided = model(input_ids=FIT).logits
    model.model.embed_tokens.weight.mul_(factor)
    model.model.layers[0].self_attn.o_proj.weight.mul_(factor)
    model.model.layers[0].mlp.down_proj.weight.mul_(factor)
    with masked(model, judge.replayer.anatomy, mask):
        torch.testing.assert_close(model(input_ids=FIT).logits, divided, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere"])
def test_the_stream_gets_the_size_that_later_sublayers_are_used_to(family: str) -> None:
    backend, judge = rescaled(family)
    dense, cut = (streams(judge, m) for m in (Mask.dense(SITES), keeping("11 00 00 11")))
    patches = backend.repair(keeping("11 00 00 11"))
    factor = weight_ratio(judge, patches[0])
    assert mean_ratio(dense[3], cut[3]) == pytest.approx(factor, rel=1e-4)
    assert mean_ratio(dense[3], cut[3] * factor) == pytest.approx(1, rel=1e-4)
    assert [patch.site for patch in patches] == [6, 7]


def test_factors_of_gaps_multiply_and_single_sublayers_are_gaps() -> None:
    backend, judge = rescaled("gpt2")
    patches = backend.repair(keeping("11 01 10 11"))
    assert [patch.site for patch in patches] == [3, 4, 6, 7]
    first, second = backend.ratio(2, [(False,)]), backend.ratio(5, [(False,)])
    found = [weight_ratio(judge, patch) for patch in patches]
    expected = [first, first, first * second, first * second]
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(patch.bias is not None for patch in patches)
    anatomy = judge.replayer.anatomy
    bias = projection_of(judge.replayer.model, anatomy, anatomy.sites[7]).bias
    assert patches[-1].bias is not None
    assert bias is not None
    torch.testing.assert_close(patches[-1].bias * first * second, bias)


def test_what_is_left_of_a_parallel_block_is_part_of_its_gap() -> None:
    backend, judge = rescaled("cohere")
    mask = keeping("11 01 11 11")
    dense, cut = streams(judge, Mask.dense(SITES)), streams(judge, mask)
    patches = backend.repair(mask)
    assert [patch.site for patch in patches] == [4, 5, 6, 7]
    ratio = mean_ratio(dense[2], cut[2])
    assert weight_ratio(judge, patches[0]) == pytest.approx(ratio, rel=1e-4)
    both = backend.repair(keeping("00 01 11 11"))
    assert [patch.site for patch in both] == [4, 5, 6, 7]


def test_tokens_without_a_stream_are_left_out() -> None:
    _, judge = rescaled("llama")
    padded = FIT.clone()
    padded[::3, 5:] = 0
    found = Rescaled(judge, padded).ratio(0, [(False,)])
    hidden, calls = judge.replayer.entry(padded)
    behind = judge.replayer.apply(calls[0], 0, hidden, attention=True, ffn=False)
    seen = padded != 0
    assert found == pytest.approx(mean_ratio(behind[seen], hidden[seen]), rel=1e-6)


def test_nothing_is_rescaled_without_a_sublayer_behind_a_gap() -> None:
    backend, _ = rescaled("llama")
    for mask in (Mask.dense(SITES), keeping("11 11 11 00"), keeping("00 00 00 00")):
        assert backend.repair(mask) == ()


def test_where_it_would_be_something_else_it_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="without a norm"):
        rescaled("olmo2")
    whole = tiny_backend(model=tiny_model("llama"), mode=Mode.WHOLE)
    with pytest.raises(UnsupportedModelError, match="can't be replayed"):
        Rescaled(whole, FIT)
    with pytest.raises(DataError, match=r"calibration\.fit_tokens"):
        Rescaled(tiny_backend(), FIT[:3])
