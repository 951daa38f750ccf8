"""Magnitude compensation, the repair that needs one number a gap (Prune&Comp, arXiv 2507.18212).

Behind a gap the residual stream is smaller than later sublayers are used to. Prune&Comp multiplies
everything that writes to the stream before the gap, embeddings included, by the mean ratio of the
dense stream's norm behind the gap to that before it. Here everything that writes behind the gap is
divided by it instead: the whole stream is then the same but for one factor, which no norm that
reads it can see, and embeddings, often tied to the head, stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from depthsearch.errors import UnsupportedModelError
from depthsearch.evaluation.fitting import FitText
from depthsearch.evaluation.inprocess import InProcess
from depthsearch.evaluation.stepping import Stepper
from depthsearch.evaluation.turns import Turn
from depthsearch.model.repair import Patch, projection_of
from depthsearch.space import Mask


class Rescaled:
    """Rescales what masks of `judge` keep, by norms on the windows `fit` `[sequence, window]`.

    This is Prune&Comp where all that reads the residual stream is a norm without regard for its
    scale: an RMSNorm or a LayerNorm, with or without a bias, to which its epsilon is nothing. So it
    is for every family here but OLMo 2, whose sublayers read the stream itself. Besides, new
    weights are rounded to the model's type.

    Raises UnsupportedModelError for other models and for those that can't be replayed.
    """

    def __init__(self, judge: InProcess, fit: Tensor) -> None:
        self._replayer = judge.replayer
        anatomy = judge.replayer.anatomy
        if not anatomy.stack.row.norm_before:
            raise UnsupportedModelError(
                f"{anatomy.model_class}: its sublayers read the residual stream without a norm, so "
                "the stream can't be rescaled by what is written to it"
            )
        self._stepper = Stepper(judge.replayer, judge.mode)
        self._fit = FitText(self._stepper, fit, judge.batch_tokens)

    def repair(self, mask: Mask) -> tuple[Patch, ...]:
        """The rescaled weights of one mask, in the order of their sites; biases are scaled too.

        Steps that are not run whole are one gap as long as no whole one is between them.
        """
        steps = self._stepper.steps
        kept = [tuple(mask.keep[site] for site in step) for step in steps]
        patches: list[Patch] = []
        divisor, start = 1.0, 0
        while start < len(steps):
            stop = start
            while stop < len(steps) and not all(kept[stop]):
                stop += 1
            for step in range(start, max(stop, start + 1)):
                patches += self._divided(steps[step], kept[step], divisor)
            if stop > start:
                divisor *= self.ratio(start, kept[start:stop])
            start = max(stop, start + 1)
        return tuple(patches)

    @torch.no_grad()
    def ratio(self, start: int, kept: Sequence[tuple[bool, ...]]) -> float:
        """How much larger the dense stream is behind a gap than the cut one, on average.

        The gap begins with step `start`, and `kept` says what is left of each of its steps. The
        average over tokens is of the ratios of their norms, as in the paper. Tokens without a
        stream, such as padding before block 0, have no ratio and are left out.
        """
        cut = self._fit.dense(start)
        for step, flags in enumerate(kept, start):
            if any(flags):
                cut = self._fit.advance(step, Turn(flags), cut)
        ratios = [
            (whole.double().norm(dim=-1).cpu() / part.double().norm(dim=-1).cpu()).flatten()
            for whole, part in zip(self._fit.dense(start + len(kept)), cut, strict=True)
        ]
        found = torch.cat(ratios)
        return float(found[found.isfinite()].mean())

    def _divided(self, step: Sequence[int], kept: Sequence[bool], divisor: float) -> list[Patch]:
        model, anatomy = self._replayer.model, self._replayer.anatomy
        if divisor == 1.0:
            return []
        return [
            projection_of(model, anatomy, anatomy.sites[site]).divided(divisor)
            for site, stays in zip(step, kept, strict=True)
            if stays
        ]
