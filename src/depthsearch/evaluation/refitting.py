"""One depth-first pass over masks that are repaired on the way.

The state of a prefix is what the judged text and the fit text became there. A refitted projection
depends only on what comes before it and on where its gap ends, so masks that agree so far share it,
as they share everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from depthsearch.evaluation.fitting import FitText, States, factors
from depthsearch.evaluation.prefix import PrefixWalk
from depthsearch.evaluation.stepping import Stepper
from depthsearch.evaluation.turns import Repair, Steps, Turn, fitted_site
from depthsearch.model.repair import Patch, patched
from depthsearch.model.replay import Call
from depthsearch.space import Mask

Judged = tuple[tuple[tuple[Call, ...], Tensor], ...]
"""For every judged batch what its blocks are called with, and what enters block 0."""


@dataclass
class Tally:
    """How often each site was run on the judged and on the fit text, and fitted there.

    The fit text also passes a step for the inputs of the projection that is fitted there.
    `normals` counts the Gram matrices, `factors` how often these were factored, `solves` the
    targets that they were solved for.
    """

    judged: list[int]
    fit: list[int]
    normals: list[int]
    factors: list[int]
    solves: list[int]

    @classmethod
    def of(cls, sites: int) -> Tally:
        """All zero."""
        return cls(*([0] * sites for _ in range(5)))


@dataclass
class Trail:
    """Where the fit text stands at one prefix, or how to bring it there from an earlier one.

    States are computed when a fit first asks for them: nobody does behind a mask's last gap, and
    those of the `dense` prefix (up to that step) are there already. It knows nothing of the judged
    text, whose states may go while a trail is kept.
    """

    dense: int | None
    origin: tuple[Trail, int, Turn, Patch | None] | None = None
    states: States = ()
    known: bool = False


@dataclass
class Prefix:
    """What one prefix came to: judged states by batch, patches so far, and the fit text's trail."""

    judged: tuple[Tensor, ...]
    patches: tuple[Patch, ...]
    trail: Trail
    fits: dict[tuple[int, Turn], Patch | None] = field(default_factory=dict)


class RefitWalk:
    """Walks masks through the model; without a fit text it only counts what would be done."""

    def __init__(
        self, steps: Steps, repair: Repair, stepper: Stepper | None, fit: FitText | None
    ) -> None:
        self._steps = steps
        self._repair: Repair = repair
        self._stepper = stepper
        self._fit = fit
        self.tally = Tally.of(sum(len(step) for step in steps))

    def run(
        self, masks: Sequence[Mask], judged: Judged, leaf: Callable[[int, Prefix], None]
    ) -> None:
        """Call `leaf(place of the mask in masks, what it came to)` once for every mask."""
        calls = [calls for calls, _ in judged]

        def advance(step: int, turn: Turn, prefix: Prefix) -> Prefix:
            return self._advance(calls, step, turn, prefix)

        walk = PrefixWalk(self._steps, advance, self._repair, self._fit_all)
        walk.run(masks, Prefix(tuple(first for _, first in judged), (), Trail(0)), leaf)
        self.tally.judged = walk.executed

    def _fit_all(self, step: int, turns: Sequence[Turn], prefix: Prefix) -> None:
        """Fit what the masks at one prefix need, with one Gram matrix for all targets."""
        targets: dict[tuple[bool, ...], list[int]] = {}
        for turn in turns:
            if turn.target is not None:
                targets.setdefault(turn.kept, []).append(turn.target)
        for kept, aims in targets.items():
            site = fitted_site(self._steps[step], Turn(kept))
            self.tally.normals[site] += 1
            self.tally.factors[site] += factors(len(aims))
            self.tally.solves[site] += len(aims)
            self._ran(step, kept)
            states = self._states(prefix.trail)
            if self._fit is None:
                continue
            for turn, patch in self._fit.fit(step, kept, sorted(aims), states).items():
                prefix.fits[step, turn] = patch

    def _advance(
        self, calls: Sequence[tuple[Call, ...]], step: int, turn: Turn, prefix: Prefix
    ) -> Prefix:
        patch = prefix.fits.get((step, turn))
        stepper, judged = self._stepper, prefix.judged
        if stepper is not None:
            with self._with(patch):
                judged = tuple(
                    stepper.run(call, step, turn.kept, hidden)
                    for call, hidden in zip(calls, judged, strict=True)
                )
        if prefix.trail.dense == step and turn.target is None and all(turn.kept):
            return Prefix(judged, prefix.patches, Trail(step + 1))
        patches = prefix.patches if patch is None else (*prefix.patches, patch)
        return Prefix(judged, patches, Trail(None, (prefix.trail, step, turn, patch)))

    def _states(self, trail: Trail) -> States:
        """The fit text's states at a prefix, moved there now where that was not done yet."""
        if trail.dense is not None:
            return () if self._fit is None else self._fit.dense(trail.dense)
        if not trail.known:
            assert trail.origin is not None
            before, step, turn, patch = trail.origin
            states = self._states(before)
            self._ran(step, turn.kept)
            if self._fit is not None:
                with self._with(patch):
                    trail.states = self._fit.advance(step, turn, states)
            trail.known, trail.origin = True, None
        return trail.states

    def _ran(self, step: int, kept: Sequence[bool]) -> None:
        """Count the sites that the fit text passes in one step."""
        for site, runs in zip(self._steps[step], kept, strict=True):
            self.tally.fit[site] += runs

    def _with(self, patch: Patch | None) -> AbstractContextManager[None]:
        if patch is None or self._stepper is None:
            return nullcontext()
        replayer = self._stepper.replayer
        return patched(replayer.model, replayer.anatomy, [patch])
