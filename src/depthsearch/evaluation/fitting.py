"""The text that repairs are fitted on: the dense model's stream there, and fits against it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthsearch.calibration.windows import batches
from depthsearch.errors import DataError, UnsupportedModelError
from depthsearch.evaluation.leaning import Leaning
from depthsearch.evaluation.stepping import Stepper
from depthsearch.evaluation.turns import Turn, fitted_site
from depthsearch.model.operators import (
    OPERATORS,
    RIDGES,
    Normal,
    Operator,
    solved,
    token_weights,
)
from depthsearch.model.repair import Patch, Projection, projection_of
from depthsearch.model.replay import Call, Replayer

_log = logging.getLogger(__name__)

HELD_BACK = 5
"""One batch in so many is held back from a fit, to choose its ridge on."""

States = tuple[Tensor, ...]
"""Hidden states `[sequence, window, hidden]` of every batch of the fit text."""


@dataclass(frozen=True)
class FitCost:
    """FLOPs of refitting each site: of its Gram matrix, of each factor of that, of each target."""

    normal: tuple[int, ...]
    factor: tuple[int, ...]
    solve: tuple[int, ...]

    @classmethod
    def of(cls, replayer: Replayer, tokens: int, operator: str = "refit") -> FitCost:
        """Two per multiplication and addition of `tokens` tokens.

        Raises UnsupportedModelError for a model that can't be refitted.
        """
        model, anatomy = replayer.model, replayer.anatomy
        found = [
            _site_cost(projection_of(model, anatomy, site), tokens, OPERATORS[operator])
            for site in anatomy.sites
        ]
        normal, factor, solve = zip(*found, strict=True)
        return cls(normal, factor, solve)

    def of_gap(self, site: int, targets: int) -> int:
        """FLOPs of fitting a site towards `targets` streams, its inputs known."""
        return self.normal[site] + factors(targets) * self.factor[site] + targets * self.solve[site]


def _site_cost(projection: Projection, tokens: int, operator: Operator) -> tuple[int, int, int]:
    """FLOPs of a Gram matrix, of a factor of it, and of a target."""
    wide, out = projection.shape
    factor, solve = operator.flops(wide, out)
    # Each change that is tried is judged on the tokens held back, and one more is made.
    target = 2 * tokens * wide * out + len(RIDGES) * (solve + 2 * wide * wide * out) + solve
    normal = 2 * tokens * wide * wide
    if projection.norm is not None:
        # The sizes that it divides by: of each token, and of all with the old and the new weight.
        normal, target = normal + 2 * tokens * wide * out, target + 4 * wide * wide * out
    return normal, factor, target


def factors(targets: int) -> int:
    """How often a Gram matrix is factored: once a ridge, and once a ridge chosen, at the most."""
    return len(RIDGES) + min(targets, len(RIDGES))


class FitText:
    """The dense model's residual stream before every step, on windows `[sequence, window]`.

    `ill_conditioned` counts the fits that gave no repair because no system could be solved. With
    `toward_text` targets lean by so many nats toward what predicts the text (see `Leaning`). Raises
    DataError for fewer windows than it takes to hold some back.
    """

    def __init__(
        self,
        stepper: Stepper,
        windows: Tensor,
        batch_tokens: int,
        operator: str = "refit",
        toward_text: float = 0.0,
    ) -> None:
        if toward_text and stepper.replayer.anatomy.encoder_blocks:
            raise UnsupportedModelError(
                f"{stepper.replayer.anatomy.model_class} is an encoder-decoder, whose repairs "
                "can't lean toward the text: set search.toward_text to 0"
            )
        if len(windows) < HELD_BACK:
            raise DataError(
                f"{len(windows)} windows to fit repairs on, at least {HELD_BACK} are needed: raise "
                "calibration.fit_tokens"
            )
        self.tokens = windows.numel() // len(stepper.replayer.anatomy.stacks)
        self.ill_conditioned = 0
        self._stepper = stepper
        self._operator = OPERATORS[operator]
        self._device = next(stepper.replayer.model.parameters()).device
        wide = windows.shape[1] // len(stepper.replayer.anatomy.stacks)
        rows = max(1, min(batch_tokens // wide, len(windows) // HELD_BACK))
        self._batches = batches(windows, rows * windows.shape[1])
        self._streams: list[States] = []
        self._calls: tuple[tuple[Call, ...], ...] = ()
        self._leaning = Leaning(stepper, toward_text) if toward_text else None

    def target(self, step: int, place: int) -> Tensor:
        """What batch `place` is fitted to before `step`."""
        stream = self.dense(step)[place]
        return stream if self._leaning is None else self._leaning.shifted(step, place, stream)

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

        `states` are those before the step. None where the weight is better left alone; where that
        is because no system could be solved, it is counted, and logged the first time.
        """
        projection = self.projection(step, Turn(kept))
        fit, held = Normal(projection, targets), Normal(projection, targets)
        for place, hidden in enumerate(states):
            with _inputs_of(projection.module) as seen:
                after = self._stepper.run(self._calls[place], step, kept, hidden)
            aimed = (self.target(target, place) for target in targets)
            streams = (after, *aimed, self.dense(step + 1)[place])
            # In a model spread over devices all is brought to where the projection is.
            device = seen[0].device
            inputs, found, *aims, whole = (
                self._tokens(place, projection, hidden).to(device) for hidden in (seen[0], *streams)
            )
            errors = [aim.float() - found.float() for aim in aims]
            part = held if place % HELD_BACK == HELD_BACK - 1 else fit
            part.add(inputs, dict(zip(targets, errors, strict=True)), token_weights(whole))
        fits = solved(projection, fit, held, self._operator)
        if fits.ill_conditioned and not self.ill_conditioned:
            _log.warning(
                "%s can't be refitted: what it is given is all zero or not finite on the fit text, "
                "so its weight stays; further such fits are counted only",
                projection.site.name,
            )
        self.ill_conditioned += len(fits.ill_conditioned)
        return {Turn(kept, target): patch for target, patch in fits.patches.items()}

    def _tokens(self, place: int, projection: Projection, hidden: Tensor) -> Tensor:
        """What one batch has `[token, channel]` where a projection writes, padding left out."""
        replayer = self._stepper.replayer
        block = replayer.anatomy.block_of(projection.site)
        ids = self._batches[place]
        if hidden.shape[1] == ids.shape[1]:
            hidden = replayer.half(hidden, block)
        seen = replayer.seen(ids)
        if seen is None:
            return hidden.flatten(0, -2)
        return hidden[replayer.half(seen, block).to(hidden.device)]

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
        if self._leaning is not None:
            for place, ids in enumerate(self._batches):
                streams = [states[place] for states in self._streams]
                self._leaning.add(ids, self._calls[place], streams)


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module is called with while the context is open."""
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    hook = module.register_forward_pre_hook(before)
    try:
        yield seen
    finally:
        hook.remove()
