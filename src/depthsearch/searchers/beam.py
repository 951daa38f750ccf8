"""Beam search over removals: greedy removal that keeps several masks a step instead of one.

A unit that looks best now may be the wrong one two steps later; a beam remembers the runners-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import merge

import numpy as np

from depthsearch.searchers.greedy import Rule, can_race, candidates, ranking
from depthsearch.searchers.options import at_least
from depthsearch.searchers.protocol import propose
from depthsearch.searchers.ranking import (
    freed_cost,
    increases_from,
    influence_keys,
    loss_increases,
    price,
    removal_keys,
    renewed_keys,
)
from depthsearch.searchers.staged import Plan
from depthsearch.space import Batch, Evaluation, Hints, Mask, SearchSpace


@dataclass(frozen=True)
class BeamOptions:
    """`width` masks are kept a step, by the `rule` of greedy removal.

    Of each mask the `expand` children are evaluated whose removals cost least when they were last
    measured (0: all). With a width of 1 and all children it is greedy removal.
    """

    width: int = 4
    rule: Rule = "cost_aware"
    expand: int = 16

    def __post_init__(self) -> None:
        at_least(self, width=1, expand=0)


@dataclass(frozen=True)
class _Parent:
    """A mask of the beam; `keys` are the loss increases of its genes as last measured."""

    mask: Mask
    evaluation: Evaluation | None
    keys: tuple[float, ...]


def beam_plan(
    space: SearchSpace, hints: Hints, rng: np.random.Generator, options: BeamOptions
) -> Plan:
    """One batch a step: the children of all masks in the beam, filled where they meet the budget.

    Masks that meet the budget have their place among the best of their step and leave the beam;
    it goes on with the rest. Failed children are passed over; a step of failures ends the search.
    """
    dense: Evaluation | None = None
    keys = influence_keys(space, hints)
    aware = options.rule == "cost_aware"
    if aware or options.expand or space.fits(space.dense):
        answers = yield Batch((propose(space, space.dense, "beam dense"),))
        dense = answers.get(space.dense)
    beam = [_Parent(space.dense, dense, keys)]
    beam = [parent for parent in beam if not space.fits(parent.mask)]
    step = 0
    while beam:
        step += 1
        origins: dict[Mask, str] = {}
        families: list[Mapping[Mask, int]] = []
        for parent in beam:
            children, origin = candidates(space, parent.mask, keys), f"beam step {step}"
            if not children:
                # As in greedy removal, pairs can run out above the cap.
                repaired = space.repair(parent.mask, rng)
                children = {repaired: freed_cost(space, parent.mask, repaired)}
                origin = f"beam repair {step}"
            elif options.expand and step > 1:
                children = _promising(space, parent, children, options)
            families.append(children)
            for child in children:
                origins.setdefault(child, origin)
        freed = {mask: freed_cost(space, space.dense, mask) for mask in origins}
        answers = yield Batch(
            tuple(propose(space, mask, origin) for mask, origin in origins.items()),
            options.width if can_race(space, options.rule, freed) else None,
        )
        if step == 1:
            keys = removal_keys(space, loss_increases(space, answers.values(), dense), keys)
        # Siblings stand in greedy's order, by what this step costs; families are merged by what
        # their masks cost from the dense model on.
        place = {mask: i for i, mask in enumerate(ranking(options.rule, answers, freed, dense))}
        ranked = [
            [(mask, parent) for mask in ranking(options.rule, answers, family, parent.evaluation)]
            for parent, family in zip(beam, families, strict=True)
        ]
        kept: dict[Mask, _Parent] = {}
        for mask, parent in merge(*ranked, key=lambda entry: place[entry[0]]):
            if len(kept) == options.width:
                break
            kept.setdefault(mask, parent)
        told = {
            parent.mask: [answers[mask] for mask in family if mask in answers]
            for parent, family in zip(beam, families, strict=True)
        }
        beam = [
            _Parent(
                mask,
                answers[mask],
                keys
                if step == 1
                else renewed_keys(
                    space,
                    increases_from(parent.mask, told[parent.mask], parent.evaluation),
                    parent.keys,
                ),
            )
            for mask, parent in kept.items()
            if not space.fits(mask)
        ]


def _promising(
    space: SearchSpace, parent: _Parent, children: Mapping[Mask, int], options: BeamOptions
) -> Mapping[Mask, int]:
    """The children that would be best if removals still cost what they last did."""

    def promise(child: Mask) -> tuple[float, str]:
        change = sum(
            key * (parent.mask.keep[gene[0]] - child.keep[gene[0]])
            for gene, key in zip(space.genes, parent.keys, strict=True)
        )
        return (
            price(change, children[child]) if options.rule == "cost_aware" else change,
            child.key,
        )

    return {child: children[child] for child in sorted(children, key=promise)[: options.expand]}
