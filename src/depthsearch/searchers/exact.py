"""Exact search: every mask on budget, on a space small enough to list.

There is no branch and bound here. Losses of masks are not monotone: dropping one more sublayer can
lower the loss, so the loss of a partial mask bounds nothing below it, and a bound from assumed
monotonicity or additivity would cut off optima without saying so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from depthsearch.errors import ConfigError
from depthsearch.searchers.options import at_least
from depthsearch.searchers.staged import Plan, best_masks
from depthsearch.space import Batch, Evaluation, Hints, Mask, Proposal, SearchSpace


@dataclass(frozen=True)
class ExhaustiveOptions:
    """How many masks are listed at `most`, and how many a batch holds.

    `survivors` of the best must be known exactly, the others may lose a race; null races none, so
    that every mask has its whole loss.
    """

    most: int = 20_000
    batch: int = 16
    survivors: int | None = None

    def __post_init__(self) -> None:
        at_least(self, most=1, batch=1)
        if self.survivors is not None:
            at_least(self, survivors=1)


def listed(space: SearchSpace, hints: Hints, options: ExhaustiveOptions) -> tuple[Mask, ...]:
    """Every mask on budget, the lowest influence of what it drops first.

    The influence of a mask is that of its gaps (ShortGPT, eq. 3, across each gap), summed. Raises
    ConfigError for a space of more than `most` masks.
    """
    masks = every_mask(space, options)
    return tuple(sorted(masks, key=lambda mask: (_influence(mask, hints), mask.key)))


def every_mask(space: SearchSpace, options: ExhaustiveOptions) -> tuple[Mask, ...]:
    """Every mask on budget; raises ConfigError for a space of more than `most` masks."""
    masks = space.enumerate(options.most)
    if masks is None:
        raise ConfigError(
            f"this space is too large for the method 'exhaustive': more than {options.most:,} of "
            f"the 2^{len(space.genes)} ways to drop its parts are on budget, or listing them takes "
            "too long; raise the option 'most', protect more sites, or take another method"
        )
    return masks


def exhaustive_plan(masks: Sequence[Mask], options: ExhaustiveOptions) -> Plan:
    """All masks in the order given, so that a run that is cut off had the likely ones."""
    known: list[Evaluation] = []
    for start in range(0, len(masks), options.batch):
        batch = tuple(Proposal(m, "exhaustive") for m in masks[start : start + options.batch])
        if options.survivors is None:
            yield Batch(batch)
            continue
        rivals = best_masks(known, options.survivors)
        known.extend((yield Batch(batch, options.survivors, rivals)).values())


def _influence(mask: Mask, hints: Hints) -> float:
    return sum(hints.influence(range(start, stop)) for start, stop in mask.runs)
