"""Repairs that are looked up: one refit for each gap, made on the dense model's own stream.

What a mask drops elsewhere is left out of account, so a gap is fitted once in a search, on as much
text as one likes, and from then on a repaired evaluation costs what a plain one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from torch import Tensor

from depthsearch.evaluation.accounting import Accounting
from depthsearch.evaluation.fitting import FitCost, FitText
from depthsearch.evaluation.stepping import Stepper
from depthsearch.evaluation.turns import Turn, fitted_site, turns_of
from depthsearch.model.repair import Patch, patched
from depthsearch.space import Mask

Gap = tuple[int, Turn]
"""The step that mends a gap, and its turn, which names where the gap ends."""

_ROOM_SHARE, _ROOM_BYTES = 0.5, 1 << 30
"""Refitted weights that are kept: as much as so much of the model's own, or so much if more."""


class RepairTable:
    """The refitted projection of every gap asked for, fitted on the windows `fit`.

    Those of the masks at hand and those used last are kept, as many as there is room for; others
    are fitted again when they are asked for, to the same weights and at no cost that is counted.
    Raises UnsupportedModelError for a model that can't be repaired.
    """

    def __init__(
        self, stepper: Stepper, accounting: Accounting, fit: Tensor, batch_tokens: int
    ) -> None:
        own = sum(p.numel() * p.element_size() for p in stepper.replayer.model.parameters())
        self._room_bytes = max(_ROOM_BYTES, int(_ROOM_SHARE * own))
        self._stepper = stepper
        self._accounting = accounting
        self._fit = FitText(stepper, fit, batch_tokens)
        self._cost = FitCost.of(stepper.replayer, self._fit.tokens)
        self._patches: dict[Gap, Patch | None] = {}
        self._counted: set[Gap] = set()

    @property
    def preparation(self) -> float:
        """The `cost_tokens` of the dense pass over the fit text."""
        return self._accounting.body(self._fit.tokens)

    def cost(self, masks: Sequence[Mask]) -> float:
        """The `cost_tokens` of the gaps of `masks` that were not counted yet."""
        flops = 0
        for (step, kept, _), targets in _by_gram(self._gaps(masks) - self._counted).items():
            sites = self._stepper.steps[step]
            site = fitted_site(sites, Turn(kept))
            for place, runs in zip(sites, kept, strict=True):
                flops += runs * self._fit.tokens * self._accounting.site_flops[place]
            flops += self._cost.of_gap(site, len(targets))
        return flops / self._accounting.dense_flops

    def count(self, masks: Sequence[Mask]) -> float:
        """`cost`, and they count as fitted from now on."""
        cost = self.cost(masks)
        self._counted |= self._gaps(masks)
        return cost

    def fit(self, masks: Sequence[Mask]) -> None:
        """Fit what is missing for `masks`, with one Gram matrix for all gaps after one step."""
        gaps = self._gaps(masks)
        missing = gaps - self._patches.keys()
        for (step, kept, given), targets in sorted(_by_gram(missing).items()):
            found = self._fit.fit(step, kept, sorted(targets), self._fit.dense(given))
            for turn, patch in found.items():
                at = None if given == step else given
                self._patches[step, replace(turn, given=at)] = patch
        self._make_room(gaps)

    def _make_room(self, gaps: set[Gap]) -> None:
        """Forget the patches used longest ago, but none of `gaps`, until the others fit."""
        for gap in gaps:
            self._patches[gap] = self._patches.pop(gap)
        size = sum(map(_bytes, self._patches.values()))
        for gap in list(self._patches):
            if size <= self._room_bytes or gap in gaps:
                return
            size -= _bytes(self._patches.pop(gap))

    def applied(self, step: int, turn: Turn) -> AbstractContextManager[None]:
        """The model with the repair of one turn, where there is one."""
        patch = self._patches[step, turn] if turn.target is not None else None
        if patch is None:
            return nullcontext()
        replayer = self._stepper.replayer
        return patched(replayer.model, replayer.anatomy, [patch])

    def _gaps(self, masks: Sequence[Mask]) -> set[Gap]:
        return {
            (step, turn)
            for mask in masks
            for step, turn in enumerate(turns_of(mask, self._stepper.steps, "table"))
            if turn.target is not None
        }


def _bytes(patch: Patch | None) -> int:
    parts = () if patch is None else (patch.weight, patch.bias, patch.norm)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def _by_gram(gaps: set[Gap]) -> dict[tuple[int, tuple[bool, ...], int], list[int]]:
    """The targets of `gaps` by the step and what it runs, and the step whose stream it is given."""
    found: dict[tuple[int, tuple[bool, ...], int], list[int]] = {}
    for step, turn in gaps:
        assert turn.target is not None
        given = step if turn.given is None else turn.given
        found.setdefault((step, turn.kept, given), []).append(turn.target)
    return found
