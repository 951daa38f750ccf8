"""Targets that lean toward what predicts the fit text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.evaluation.tiny_backends import assorted_masks, tiny_backend
from tests.tiny_models import keeping, tiny_ids, tiny_model

from depthsearch.calibration.objectives import CrossEntropy
from depthsearch.errors import UnsupportedModelError
from depthsearch.evaluation import Refitted
from depthsearch.evaluation.leaning import Leaning
from depthsearch.evaluation.stepping import Stepper
from depthsearch.model.families import ENCODER_DECODERS, FAMILIES
from depthsearch.model.repair import patched

SITES = 8
FIT = tiny_ids(40, 12, seed=7)
REPAIRED = [name for name, row in FAMILIES.items() if not row.post_norm]


def ordinary(replayer: Any, ids: torch.Tensor, step: int, hidden: torch.Tensor) -> float:
    """The mean cross-entropy of the dense model, run on from what enters a step."""
    stepper = Stepper(replayer, tiny_backend(model=replayer.model).mode)
    _, calls = replayer.entry(ids)
    for later in range(step, len(stepper.steps)):
        hidden = stepper.run(calls, later, (True,) * len(stepper.steps[later]), hidden)
    scores = replayer.logits(hidden[:, :-1].flatten(0, 1)).double()
    # Every token counts, the last of a window too, which predicts nothing.
    return float(
        torch.nn.functional.cross_entropy(scores, ids[:, 1:].flatten(), reduction="sum")
        / ids.numel()
    )


@pytest.mark.parametrize("family", REPAIRED)
def test_a_shift_lowers_the_cross_entropy_by_so_many_nats_at_every_step(family: str) -> None:
    judge = tiny_backend(model=tiny_model(family))
    replayer = judge.replayer
    stepper, ids = Stepper(replayer, judge.mode), FIT[:8]
    hidden, calls = replayer.entry(ids)
    streams = [hidden]
    for step, sites in enumerate(stepper.steps):
        streams.append(stepper.run(calls, step, (True,) * len(sites), streams[-1]))
    nats = 0.0002
    leaning = Leaning(stepper, nats)
    leaning.add(ids, calls, streams)
    before = ordinary(replayer, ids, 0, hidden)
    for step, stream in enumerate(streams):
        after = ordinary(replayer, ids, step, leaning.shifted(step, 0, stream))
        assert before - after == pytest.approx(nats, rel=0.1)


@pytest.mark.parametrize("family", REPAIRED)
def test_losses_are_those_of_the_patched_model_and_gradients_are_counted(family: str) -> None:
    judge = tiny_backend(model=tiny_model(family))
    plain = Refitted(judge, FIT, "sequential")
    backend = Refitted(judge, FIT, "sequential", toward_text=1.0)
    masks = assorted_masks(SITES)
    found = backend.run(0, masks)
    assert found.cost_tokens == plain.plan(masks)
    assert backend.preparation - plain.preparation == judge.accounting.leaning(FIT.numel()) > 0
    for mask, losses in zip(masks, found.losses, strict=True):
        with patched(judge.replayer.model, judge.replayer.anatomy, backend.repair(mask)):
            each = [judge.run(b, [mask]).losses[0] for b in range(len(judge.sequences))]
        assert losses == tuple(loss for batch in each for loss in batch)


def test_a_model_that_leans_predicts_text_of_that_kind_better() -> None:
    # Of all tokens this text has a few alone, which a random model can't know.
    kind = tiny_ids(400, 12, seed=7) % 5 + 20
    judge = tiny_backend(objective=CrossEntropy(), rows=2)
    mask = keeping("11 11 00 11")
    losses = []
    for nats in (0.0, 0.5, 2.0):
        patches = Refitted(judge, kind[:300], "sequential", toward_text=nats).repair(mask)
        with patched(judge.replayer.model, judge.replayer.anatomy, patches):
            ids = kind[300:]
            recording = judge.replayer.record(ids)
            last = judge.replayer.whole(recording, mask)
            scores = judge.replayer.logits(last[:, :-1].flatten(0, 1))
            losses.append(float(torch.nn.functional.cross_entropy(scores, ids[:, 1:].flatten())))
    assert losses[2] < losses[1] < losses[0]
    assert losses[0] - losses[1] > 0.1


@pytest.mark.parametrize("model_type", ["t5", "mbart"])
def test_encoder_decoders_are_refused(model_type: str) -> None:
    assert model_type in ENCODER_DECODERS
    from tests.evaluation.test_two_stack_losses import FIT as ROWS
    from tests.evaluation.test_two_stack_losses import backend

    with pytest.raises(UnsupportedModelError, match=r"toward_text"):
        Refitted(backend(model_type), ROWS, "gap", toward_text=1.0)
