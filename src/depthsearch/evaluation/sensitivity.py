"""First-order sensitivity: what the loss would change if the gate of one sublayer closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from depthsearch.calibration.objectives import cross_entropy_gradient
from depthsearch.errors import ModelError, UnsupportedModelError
from depthsearch.evaluation.samples import Sample, is_out_of_memory
from depthsearch.model.gates import gate_gradients
from depthsearch.model.replay import Mode, Recording, Replayer
from depthsearch.space import Sensitivity


def gate_sensitivity(
    replayer: Replayer,
    mode: Mode,
    samples: Sequence[Sample],
    recording: Callable[[int], Recording],
) -> Sensitivity:
    """The first-order estimates of every site over all `samples`; `recording(i)` is of sample i.

    The loss L is the cross-entropy, averaged over the positions looked at in each sequence,
    whatever the objective is: a distance to the dense model has no gradient at the dense model.
    Raises UnsupportedModelError for a model whose blocks can't be replayed, ModelError where the
    gradients are not finite or memory runs out.
    """
    if replayer.anatomy.encoder_blocks:
        raise UnsupportedModelError(
            f"{replayer.anatomy.model_class} is an encoder-decoder, for which no gradients of "
            "single sublayers are there: choose another search.method"
        )
    if mode is Mode.WHOLE:
        raise UnsupportedModelError(
            f"{replayer.anatomy.model_class}: its blocks can't be replayed on their own, so there "
            "are no gradients of single sublayers: choose another search.method"
        )
    try:
        gates = [_gates(replayer, sample, recording(i)) for i, sample in enumerate(samples)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            "memory ran out while gradients were computed: lower calibration.batch_tokens, or "
            "choose another search.method"
        ) from error
    found = torch.cat(gates, dim=1)
    if not found.isfinite().all():
        raise ModelError(
            "the gradients of the dense model are not finite on the calibration text: load it with "
            "another model.dtype, such as float32"
        )
    return Sensitivity(
        tuple((-found.mean(1)).tolist()),
        tuple(found.abs().mean(1).tolist()),
    )


def _gates(replayer: Replayer, sample: Sample, recording: Recording) -> Tensor:
    """dL/dg `[site, sequence]` on one batch, where L is a mean over each sequence's positions."""
    last = sample.at(recording.last)
    gradient = cross_entropy_gradient(replayer.head, last, sample.targets)
    found = gate_gradients(replayer, recording, sample.placed(gradient, recording.last))
    return found / sample.positions.shape[1]
