"""The text that repairs are fitted on: the dense model's stream there, and fits against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from depthsearch.calibration.windows import batches
from depthsearch.errors import DataError
from depthsearch.evaluation.stepping import Stepper
from depthsearch.evaluation.turns import Turn, fitted_site
from depthsearch.model.repair import (
    OPERATORS,
    RIDGES,
    Normal,
    Patch,
    Projection,
    projection_of,
    solved,
    token_weights,
)
from depthsearch.model.replay import Call, Replayer

HELD_BACK = 5
"""One batch in so many is held back from a fit, to choose its ridge on."""

States = tuple[Tensor, ...]
"""Hidden states `[sequence, window, hidden]` of every batch of the fit text."""


@dataclass(frozen=True)
class FitCost:
    """FLOPs of fitting the projection of each site: for the Gram matrix, and for each target."""

    normal: tuple[int, ...]
    solve: tuple[int, ...]

    @classmethod
    def of(cls, replayer: Replayer, tokens: int) -> FitCost:
        """Two per multiplication and addition of `tokens` tokens; a Cholesky factor a ridge.

        Raises UnsupportedModelError for a model whose projections can't be refitted.
        """
        model, anatomy = replayer.model, replayer.anatomy
        shapes = [projection_of(model, anatomy, site).weight.shape for site in anatomy.sites]
        tries = len(RIDGES) + 1
        return cls(
            tuple(2 * tokens * wide * wide for _, wide in shapes),
            tuple(
                2 * tokens * wide * out + tries * (wide**3 // 3 + 4 * wide * wide * out)
                for out, wide in shapes
            ),
        )


class FitText:
    """The dense model's residual stream before every step, on windows `[sequence, window]`.

    Raises DataError for fewer windows than it takes to hold some back.
    """

    def __init__(
        self, stepper: Stepper, windows: Tensor, batch_tokens: int, operator: str = "refit"
    ) -> None:
        if len(windows) < HELD_BACK:
            raise DataError(
                f"{len(windows)} windows to fit repairs on, at least {HELD_BACK} are needed: raise "
                "calibration.fit_tokens"
            )
        self.tokens = windows.numel()
        self._stepper = stepper
        self._operator = OPERATORS[operator]
        self._device = next(stepper.replayer.model.parameters()).device
        rows = max(1, min(batch_tokens // windows.shape[1], len(windows) // HELD_BACK))
        self._batches = batches(windows, rows * windows.shape[1])
        self._streams: list[States] = []
        self._calls: tuple[tuple[Call, ...], ...] = ()

    def dense(self, step: int) -> States:
        """The dense stream before `step`; the last one is that behind all steps."""
        if not self._streams:
            self._record()
        return self._streams[step]

    @torch.no_grad()
    def advance(self, step: int, turn: Turn, states: States) -> States:
        """The states behind one step."""
        return tuple(
            self._stepper.run(calls, step, turn.kept, hidden)
            for calls, hidden in zip(self._calls, states, strict=True)
        )

    @torch.no_grad()
    def fit(
        self, step: int, kept: tuple[bool, ...], targets: Sequence[int], states: States
    ) -> dict[Turn, Patch | None]:
        """The projection that `kept` runs last, refitted towards the dense stream at each target.

        `states` are those before the step. None where the weight is better left alone.
        """
        projection = self.projection(step, Turn(kept))
        fit, held = Normal(projection, targets), Normal(projection, targets)
        seen: list[Tensor] = []
        hook = projection.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            for place, hidden in enumerate(states):
                after = self._stepper.run(self._calls[place], step, kept, hidden)
                inputs = seen.pop().flatten(0, -2)
                found = after.flatten(0, -2).float()
                aims = {t: self.dense(t)[place].flatten(0, -2) for t in targets}
                weights = token_weights(self.dense(step + 1)[place].flatten(0, -2))
                part = held if place % HELD_BACK == HELD_BACK - 1 else fit
                part.add(inputs, {t: aim.float() - found for t, aim in aims.items()}, weights)
        finally:
            hook.remove()
        return {
            Turn(kept, target): solved(projection, fit, held, target, self._operator)
            for target in targets
        }

    def projection(self, step: int, turn: Turn) -> Projection:
        """What a turn refits."""
        replayer = self._stepper.replayer
        site = fitted_site(self._stepper.steps[step], turn)
        return projection_of(replayer.model, replayer.anatomy, replayer.anatomy.sites[site])

    @torch.no_grad()
    def _record(self) -> None:
        entries = [self._stepper.replayer.entry(ids.to(self._device)) for ids in self._batches]
        self._calls = tuple(calls for _, calls in entries)
        self._streams.append(tuple(first for first, _ in entries))
        for step, sites in enumerate(self._stepper.steps):
            whole = Turn((True,) * len(sites))
            self._streams.append(self.advance(step, whole, self._streams[step]))
