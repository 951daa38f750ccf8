"""One-shot methods: rank once, then cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from depthsearch.errors import InputError
from depthsearch.searchers.baselines import BLOCK_INFLUENCE, SINGLE_REMOVAL, window_baselines
from depthsearch.searchers.options import at_least
from depthsearch.searchers.protocol import propose
from depthsearch.searchers.ranking import (
    Unit,
    block_influence_keys,
    drop_in_order,
    freed_share,
    influence_keys,
    loss_increases,
    per_cost,
    price,
    removal_keys,
)
from depthsearch.searchers.staged import Answers, Plan
from depthsearch.space import Batch, Hints, Proposal, SearchSpace, Status

SIMILARITY = "similarity"
SENSITIVITY = "sensitivity"


@dataclass(frozen=True)
class BlockInfluenceOptions:
    """What is ranked, and whether the influence is divided by the cost freed."""

    level: Literal["block", "site"] = "block"
    per_cost: bool = False


@dataclass(frozen=True)
class SimilarityOptions:
    """`joint` ranks attention and FFN sublayers together.

    `attention` drops attention sublayers as long as that suffices and FFN ones after them; `ffn`
    the other way round. Cross-attention counts as attention.
    """

    target: Literal["joint", "attention", "ffn"] = "joint"


@dataclass(frozen=True)
class SensitivityOptions:
    """Which first-order estimate ranks, and whether it is divided by the cost freed.

    `magnitude` is the mean over sequences of |dL/dg|; `signed` is the loss change expected, -dL/dg,
    so that what should lower the loss goes first.
    """

    estimate: Literal["magnitude", "signed"] = "magnitude"
    per_cost: bool = False


@dataclass(frozen=True)
class AngularWindowOptions:
    """No options."""


@dataclass(frozen=True)
class SingleRemovalOptions:
    """No options."""


@dataclass(frozen=True)
class WindowsOptions:
    """How many of the best windows must be known exactly."""

    survivors: int = 4

    def __post_init__(self) -> None:
        at_least(self, survivors=1)


def block_influence_plan(space: SearchSpace, hints: Hints, options: BlockInfluenceOptions) -> Plan:
    """The one mask of the block-influence ranking (ShortGPT, eq. 3)."""
    keys = (block_influence_keys if options.level == "block" else influence_keys)(space, hints)
    if options.per_cost:
        keys = per_cost(space, keys)
    origin = f"{BLOCK_INFLUENCE} of {options.level}s" + (" per cost" if options.per_cost else "")
    yield Batch((Proposal(space.decode(keys), origin),))


def similarity_plan(space: SearchSpace, hints: Hints, options: SimilarityOptions) -> Plan:
    """The one mask that drops the sublayers whose output is most like their input.

    Similarity is the mean cosine over tokens between the residual stream before a sublayer and the
    one after it ("What Matters in Transformers? Not All Attention is Needed", arXiv 2406.15786).
    That is one minus the block influence of the site, so that `target: joint` gives the mask of
    `block_influence` with `level: site`. In a space of whole blocks genes are blocks, and in a
    packable one every pair holds one sublayer of each kind: `target` changes nothing there.
    """
    keys = influence_keys(space, hints)
    origin = f"{SIMILARITY} of attention and FFN"
    if options.target != "joint":
        keys = kind_first(space, keys, options.target)
        first, then = (
            ("attention", "FFN") if options.target == "attention" else ("FFN", "attention")
        )
        origin = f"{SIMILARITY} of {first}, then {then}"
    yield Batch((Proposal(space.decode(keys), origin),))


def sensitivity_plan(space: SearchSpace, hints: Hints, options: SensitivityOptions) -> Plan:
    """The one mask of the ranking by first-order sensitivity to a gate on each sublayer.

    Molchanov et al., arXiv 1611.06440, with a gate for each sublayer; LLM-Pruner (arXiv 2305.11627)
    ranks groups of weights likewise, and as there the estimates of a group are added up. They are
    of the cross-entropy, whatever the objective is: the KL divergence to the dense model and every
    other distance to it is at its lowest there, where its gradient is zero or none. Raises
    InputError for hints without a sensitivity.
    """
    if hints.sensitivity is None:
        raise InputError(
            f"the method '{SENSITIVITY}' ranks by gradients, but the hints hold none: hand in "
            "hints with a sensitivity"
        )
    of_site = getattr(hints.sensitivity, options.estimate)
    keys = [sum(of_site[i] for i in gene) for gene in space.genes]
    if options.per_cost:
        freed = [freed_share(space, space.dense.without(gene)) for gene in space.genes]
        keys = [price(key, cost) for key, cost in zip(keys, freed, strict=True)]
    origin = f"{SENSITIVITY}, {options.estimate}" + (" per cost" if options.per_cost else "")
    yield Batch((Proposal(space.decode(keys), origin),))


def kind_first(
    space: SearchSpace, keys: Sequence[float], target: Literal["attention", "ffn"]
) -> tuple[float, ...]:
    """Keys in the same order within each kind, all of the kind `target` below all others."""
    later = 1.0 + max(keys) - min(keys)
    kinds = [space.sites[gene[0]].kind for gene in space.genes]
    return tuple(
        key if (kind == "ffn") == (target == "ffn") else key + later
        for key, kind in zip(keys, kinds, strict=True)
    )


def angular_window_plan(space: SearchSpace, hints: Hints) -> Plan:
    """The one contiguous window with the smallest angular distance across it.

    "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887, eq. 7; the hints
    average the distance over all tokens, where the paper takes the last one of each sequence. It is
    the first window of the method `windows`, without measuring the others; one whose evaluation
    fails gives way to the next. Nothing is proposed where protected sites leave no window that
    meets the budget.
    """
    for proposal in window_baselines(space, hints):
        answers = yield Batch((proposal,))
        if any(evaluation.status.has_loss for evaluation in answers.values()):
            return


def windows_plan(space: SearchSpace, hints: Hints, options: WindowsOptions) -> Plan:
    """Every contiguous window, the smallest angular distance first."""
    yield Batch(window_baselines(space, hints), options.survivors)


def single_removal_plan(space: SearchSpace, hints: Hints) -> Plan:
    """Measure every single removal, then cut by loss increase, plain and per unit of cost."""
    sweep = removal_sweep(space)
    answers = yield sweep
    ranking = rank_removals(space, hints, answers)
    yield Batch(removal_masks(space, ranking))


@dataclass(frozen=True)
class RemovalRanking:
    """What a sweep of single removals tells.

    `plain` and `by_cost` are the dropped units in order of loss increase and of increase per unit
    of budget freed; `keys` holds one loss increase a gene.
    """

    plain: tuple[Unit, ...]
    by_cost: tuple[Unit, ...]
    keys: tuple[float, ...]


def removal_sweep(space: SearchSpace) -> Batch:
    """The dense model and every single removal; none of them usually meets the budget."""
    masks = {space.dense: "dense"} | dict.fromkeys(space.removals(space.dense), "sweep")
    return Batch(tuple(propose(space, mask, origin) for mask, origin in masks.items()))


def rank_removals(space: SearchSpace, hints: Hints, answers: Answers) -> RemovalRanking:
    """Rank the units of a sweep by what their removal cost."""
    evaluations = [e for e in answers.values() if e.status in (Status.OK, Status.ELIMINATED)]
    increases = loss_increases(space, evaluations, answers.get(space.dense))
    prices = {
        unit: price(increase, freed_share(space, space.dense.without(unit)))
        for unit, increase in increases.items()
    }
    return RemovalRanking(
        tuple(sorted(increases, key=lambda unit: (increases[unit], unit))),
        tuple(sorted(prices, key=lambda unit: (prices[unit], unit))),
        removal_keys(space, increases, influence_keys(space, hints)),
    )


def removal_masks(space: SearchSpace, ranking: RemovalRanking) -> tuple[Proposal, ...]:
    """The two masks that a sweep leads to, or one where both rankings agree."""
    plain = drop_in_order(space, ranking.plain, ranking.keys)
    by_cost = drop_in_order(space, ranking.by_cost, per_cost(space, ranking.keys))
    masks = {plain: SINGLE_REMOVAL}
    masks.setdefault(by_cost, f"{SINGLE_REMOVAL} per cost")
    return tuple(Proposal(mask, origin) for mask, origin in masks.items())
