"""Targets of repairs that lean from the dense stream toward what predicts the fit text.

The dense model knows nothing of the text that a repair is fitted on. A step down the gradient of
its cross-entropy there turns its stream into one that predicts this text better, and a refit
towards that learns of the step what can be told from its inputs: the kind of the text, not its
tokens. So a cut model adapts to the text while it is repaired, still in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from depthsearch.calibration.objectives import cross_entropy_gradient
from depthsearch.errors import ModelError
from depthsearch.evaluation.stepping import Stepper
from depthsearch.model.replay import Call

CLIP = 3.0
"""Gradients longer than so many times the median of their batch are cut to that.

Where the stream of a token is nearly zero a norm behind it makes its gradient huge, and a few such
tokens would be all that a step down the gradient is about."""


class Leaning:
    """How far the targets at each step are from the dense stream, for every batch.

    At each step the shift of a token is its clipped gradient times one number, chosen so that the
    shifts of all tokens lower their mean cross-entropy by `nats` to first order (the step size of
    Polyak, 1987). Shifts are kept in bfloat16, which is finer than they are known.
    """

    def __init__(self, stepper: Stepper, nats: float) -> None:
        self._stepper = stepper
        self._nats = nats
        self._gradients: list[tuple[Tensor, ...]] = []
        self._lowered = [0.0] * (len(stepper.steps) + 1)
        self._tokens = 0

    def add(self, ids: Tensor, calls: tuple[Call, ...], streams: Sequence[Tensor]) -> None:
        """Take one batch: ids and its dense stream `[sequence, window, hidden]` by step.

        Raises ModelError for gradients that are not finite.
        """
        replayer, steps = self._stepper.replayer, self._stepper.steps
        last = streams[-1]
        gradient = torch.zeros_like(last)
        gradient[:, :-1] = cross_entropy_gradient(
            replayer.head,
            last[:, :-1].flatten(0, 1),
            ids[:, 1:].flatten().to(last.device),
        ).unflatten(0, (ids.shape[0], ids.shape[1] - 1))
        found = [gradient]
        for step in reversed(range(len(steps))):
            with torch.enable_grad():
                entered = streams[step].detach().requires_grad_()
                left = replayer.through(calls, steps[step], (True,) * len(steps[step]), entered)
                (gradient,) = torch.autograd.grad(left, [entered], gradient.to(left.device))
            found.append(gradient)
        found.reverse()
        if not all(bool(gradient.isfinite().all()) for gradient in found):
            raise ModelError(
                "the gradients of the dense model are not finite on the fit text: load it with "
                "another model.dtype, such as float32, or set search.toward_text to 0"
            )
        shifts = [_clipped(gradient) for gradient in found]
        for place, (gradient, shift) in enumerate(zip(found, shifts, strict=True)):
            self._lowered[place] += float((gradient.double() * shift.double()).sum())
        self._gradients.append(tuple(shift.bfloat16() for shift in shifts))
        self._tokens += ids.numel()

    def shifted(self, step: int, place: int, stream: Tensor) -> Tensor:
        """The target before `step` for batch `place`, whose dense `stream` there is given."""
        lowered = self._lowered[step]
        if not lowered:
            return stream
        size = self._nats * self._tokens / lowered
        return stream.float() - size * self._gradients[place][step].float()


def _clipped(gradient: Tensor) -> Tensor:
    """Gradients `[sequence, window, hidden]`, each token's cut to `CLIP` times their median."""
    lengths = gradient.float().norm(dim=-1, keepdim=True)
    some = lengths[lengths > 0]
    if not len(some):
        return gradient
    factors = (CLIP * some.median() / lengths.clamp_min(1e-30)).clamp_max(1.0)
    clipped: Tensor = gradient * factors.to(gradient)
    return clipped
