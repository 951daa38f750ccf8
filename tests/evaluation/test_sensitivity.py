"""Gradients by gates against finite differences of models whose weights are scaled outright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.evaluation.tiny_backends import tiny_backend
from tests.tiny_models import MODEL_TYPES, tiny_ids, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from depthsearch.calibration.objectives import OBJECTIVES
from depthsearch.errors import ModelError, UnsupportedModelError
from depthsearch.evaluation import InProcess, Refitted
from depthsearch.evaluation.planned import Planned
from depthsearch.model.replay import Mode
from depthsearch.space import Mask

SITES = 8
STEP = 0.02


@contextmanager
def scaled(backend: InProcess, site: int, factor: float) -> Iterator[Any]:
    """The model with what one site adds to the stream scaled in its weights, no hook involved."""
    anatomy, model = backend.replayer.anatomy, backend.replayer.model
    row = anatomy.stack.row
    block = anatomy.block_list(model)[site // 2]
    if row.norm_after:
        norm = getattr(block, (row.attention_norms, row.ffn_norms)[site % 2][-1])
        # Gemma's norms multiply by one more than their weight.
        shift = 0.0 if anatomy.model_type == "olmo2" else 1.0
        changed = {norm.weight: (norm.weight + shift) * factor - shift}
    else:
        sublayer = getattr(block, (row.attention, row.ffn)[site % 2])
        projection: nn.Module = getattr(sublayer, (row.attention_out, row.ffn_out)[site % 2])
        changed = {weight: weight * factor for weight in projection.parameters()}
    before = {weight: weight.detach().clone() for weight in changed}
    try:
        for weight, value in changed.items():
            weight.data.copy_(value)
        yield model
    finally:
        for weight, value in before.items():
            weight.data.copy_(value)


@torch.no_grad()
def cross_entropies(backend: InProcess, model: Any) -> Tensor:
    """The cross-entropy `[sequence]` at the positions, from full logits of ordinary passes."""
    found = []
    for sample in backend.samples:
        logs = model(input_ids=sample.ids, use_cache=False).logits.double().log_softmax(-1)
        chosen = logs[:, :-1].gather(-1, sample.ids[:, 1:, None]).squeeze(-1)
        found.append(-chosen.gather(1, sample.positions).mean(-1))
    return torch.cat(found)


def differences(backend: InProcess) -> Tensor:
    """dL/dg `[site, sequence]` by central differences of fourth order.

    Norms round to float32 whatever the model's type, so the step must not be small.
    """
    rows = []
    for site in range(SITES):
        at = {}
        for steps in (-2, -1, 1, 2):
            with scaled(backend, site, 1 + steps * STEP) as model:
                at[steps] = cross_entropies(backend, model)
        rows.append((8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * STEP))
    return torch.stack(rows)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_estimates_are_those_of_finite_differences(family: str) -> None:
    backend = tiny_backend(family, torch.float64)
    found, _ = backend.sensitivity()
    expected = differences(backend)
    assert expected.shape == (SITES, 5)
    near = {"rel": 1e-3, "abs": 2e-5}
    assert list(found.signed) == pytest.approx((-expected.mean(1)).tolist(), **near)
    assert list(found.magnitude) == pytest.approx(expected.abs().mean(1).tolist(), **near)
    assert expected.abs().mean() > 100 * near["abs"]
    # Signs differ between sequences somewhere, or the two estimates would be one.
    assert any(m > 1.01 * abs(s) for s, m in zip(found.signed, found.magnitude, strict=True))


@pytest.mark.parametrize("family", ["llama", "cohere", "gemma2"])
def test_a_number_format_of_few_digits_changes_little(family: str) -> None:
    exact, _ = tiny_backend(family, torch.float32).sensitivity()
    rounded, _ = tiny_backend(family, torch.bfloat16).sensitivity()
    errors = [abs(a - b) for a, b in zip(exact.signed, rounded.signed, strict=True)]
    assert max(errors) < 0.1 * max(map(abs, exact.signed))


def test_the_objective_and_the_repair_change_nothing() -> None:
    """The loss is always the cross-entropy, of the model as it is."""
    model = tiny_model("llama")
    expected = tiny_backend(model=model).sensitivity()
    for build in OBJECTIVES.values():
        assert tiny_backend(model=model, objective=build()).sensitivity() == expected
    fit = tiny_ids(20, 12, seed=7)
    assert tiny_backend(model=model, fit=fit).sensitivity() == expected
    assert Refitted(tiny_backend(model=model), fit, "gap").sensitivity() == expected
    assert Planned(tiny_backend(model=model)).sensitivity() == expected


def test_batches_change_no_more_than_rounding() -> None:
    """Positions are drawn batch by batch, so all of them are looked at."""
    model = tiny_model("llama", dtype=torch.float64)
    found = [
        tiny_backend(model=model, positions=1.0, batch_tokens=tokens).sensitivity()[0]
        for tokens in (12, 60)
    ]
    assert found[0].signed == pytest.approx(found[1].signed, rel=1e-9)
    assert found[0].magnitude == pytest.approx(found[1].magnitude, rel=1e-9)


def test_the_model_is_left_as_it_was() -> None:
    backend = tiny_backend("llama")
    model = backend.replayer.model
    for weight in model.parameters():
        weight.requires_grad_(True)
    before = backend.run(0, [Mask.dense(SITES)]).losses
    backend.sensitivity()
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert backend.run(0, [Mask.dense(SITES)]).losses == before


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_one_block_at_a_time_holds_what_gradients_need(family: str) -> None:
    held, peak = 0, 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, peak
            self.tensor = tensor
            held += tensor.nbytes
            peak = max(peak, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.tensor.nbytes

    peaks = []
    for blocks in (2, 6):
        backend = tiny_backend(model=tiny_model(family, blocks), rows=2)
        backend.recording(0)
        peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            backend.sensitivity()
        assert held == 0
        peaks.append(peak)
    assert peaks[0] == peaks[1] > 0


class Counting(TorchDispatchMode):
    """Adds up the FLOPs of matrix products, backward ones included, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_the_cost_is_what_is_computed(family: str) -> None:
    """Against the matrix products that torch itself counts."""
    model = tiny_model(family, attn_implementation="eager")
    backend = tiny_backend(model=model, rows=4, tokens=48, batch_tokens=96)
    for batch in range(len(backend.sequences)):
        backend.recording(batch)
    with Counting() as counter:
        _, cost = backend.sensitivity()
    ran = counter.flops / backend.accounting.dense_flops
    # Attention is charged twice backwards, where only its products of activations are.
    assert 0.85 * cost < ran <= cost


def test_what_gives_no_gradients_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match="can't be replayed"):
        tiny_backend("llama", mode=Mode.WHOLE).sensitivity()
    backend = tiny_backend("llama")
    backend.replayer.anatomy.block_list(backend.replayer.model)[1].mlp.down_proj.weight[0, 0] = (
        torch.inf
    )
    with pytest.raises(ModelError, match="not finite"):
        backend.sensitivity()
    backend = tiny_backend("llama")

    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backend.replayer, "head", full)
    with pytest.raises(ModelError, match=r"lower calibration\.batch_tokens"):
        backend.sensitivity()
