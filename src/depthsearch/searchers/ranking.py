"""What one site seems to be worth: ranking keys from hints and from single removals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress, count
from operator import gt

from depthsearch.space import Evaluation, Hints, Mask, SearchSpace

Unit = tuple[int, ...]


def difference(larger: Mask, smaller: Mask) -> Unit:
    """The sites that `larger` keeps and `smaller` drops."""
    return tuple(compress(count(), map(gt, larger.keep, smaller.keep)))


def influence_keys(space: SearchSpace, hints: Hints) -> tuple[float, ...]:
    """Block influence of each gene (ShortGPT): higher means keep."""
    return tuple(hints.influence(gene) for gene in space.genes)


def block_influence_keys(space: SearchSpace, hints: Hints) -> tuple[float, ...]:
    """Influence of each gene's whole block, counting the sites of it that are free to go."""
    blocks: dict[tuple[str, int], list[int]] = {}
    for index in sorted(space.free):
        site = space.sites[index]
        blocks.setdefault((site.stack, site.block), []).append(index)
    sites = [space.sites[gene[0]] for gene in space.genes]
    return tuple(hints.influence(blocks[site.stack, site.block]) for site in sites)


def per_cost(space: SearchSpace, keys: Sequence[float]) -> tuple[float, ...]:
    """Each gene's key per unit of budget it frees, in units of the mean freed cost.

    A gene that frees nothing keeps its own key, as it is never dropped alone. Of two equal gains,
    which are keys below zero, the one that frees more is the larger, as for `price`.
    """
    freed = [freed_share(space, space.dense.without(gene)) for gene in space.genes]
    mean = sum(freed) / len(freed) or 1.0
    shares = [f / mean if f else 1.0 for f in freed]
    return tuple(k * s if k < 0 else k / s for k, s in zip(keys, shares, strict=True))


def removal_keys(
    space: SearchSpace, increases: Mapping[Unit, float], fallback: Sequence[float]
) -> tuple[float, ...]:
    """One key a gene from the loss increases of dropped units: the mean of the units it is in.

    Genes without a known increase (their evaluation failed) count as the worst; `fallback` is
    returned where nothing is known at all.
    """
    if not increases:
        return tuple(fallback)
    return renewed_keys(space, increases, [max(increases.values())] * len(space.genes))


def renewed_keys(
    space: SearchSpace, increases: Mapping[Unit, float], keys: Sequence[float]
) -> tuple[float, ...]:
    """`keys`, one a gene, with those replaced that loss increases of dropped units tell anew."""
    of_site: dict[int, list[float]] = {}
    for unit, increase in increases.items():
        for index in unit:
            of_site.setdefault(index, []).append(increase)
    found = [of_site.get(gene[0], [key]) for gene, key in zip(space.genes, keys, strict=True)]
    return tuple(sum(values) / len(values) for values in found)


def loss_increases(
    space: SearchSpace, evaluations: Iterable[Evaluation], dense: Evaluation | None
) -> dict[Unit, float]:
    """The loss increase of each unit whose single removal has a loss, by the unit's sites.

    A mask that lost its race is compared on the sequences it was evaluated on. Where the dense
    model itself lost, or has no losses, one of the masks with the most sequences stands in for it:
    all increases are then off by one constant, which leaves their order right.
    """
    return increases_from(space.dense, evaluations, dense)


def increases_from(
    mask: Mask, evaluations: Iterable[Evaluation], known: Evaluation | None
) -> dict[Unit, float]:
    """The loss increase of each unit dropped from `mask`, whose own evaluation is `known`.

    As `loss_increases`, but from any mask on; masks that also put something back are left out.
    """
    told = tuple(evaluations)
    reference = reference_of((known, *told))
    if reference is None or reference.loss is None:
        return {}
    apart = -reference.loss
    if known is not None and known.loss is not None:
        apart = known.loss - _mean_of_first(reference, len(known.losses))
    return {
        difference(mask, e.mask): e.loss - (_mean_of_first(reference, len(e.losses)) + apart)
        for e in told
        if e.loss is not None and e.mask != mask and not difference(e.mask, mask)
    }


def reference_of(evaluations: Iterable[Evaluation | None]) -> Evaluation | None:
    """What masks that lost a race are compared by (`Evaluation.estimate`).

    The first of the evaluations with the most sequences: the complete ones, if there are any.
    """
    judged = (e for e in evaluations if e is not None and e.loss is not None)
    return max(judged, key=lambda e: len(e.losses), default=None)


def _mean_of_first(evaluation: Evaluation, count: int) -> float:
    return math.fsum(evaluation.losses[:count]) / count


def drop_in_order(space: SearchSpace, units: Iterable[Unit], keys: Sequence[float]) -> Mask:
    """Drop whole units in the order given until the budget is met, then put back what fits.

    Units that overlap an earlier one are passed over; where the units don't suffice, the mask is
    decoded from `keys` instead.
    """
    mask = space.dense
    for unit in units:
        if space.fits(mask):
            break
        if all(mask.keep[i] for i in unit):
            mask = mask.without(unit)
    return space.fill(mask, keys) if space.fits(mask) else space.decode(keys)


def freed_share(space: SearchSpace, mask: Mask) -> float:
    """What `mask` frees of the dense model's cost, in the budget's own unit.

    Of two costs the sum of what it frees of each over what must be freed of it: weights of a
    surrogate constraint, which are equal where both caps are as far away.
    """
    if len(space.limits) == 1:
        return space.cost(space.dense) - space.cost(mask)
    return sum(
        (limit.dense - limit.cost(mask)) / (limit.dense - limit.cap)
        for limit in space.limits
        if limit.dense > limit.cap
    )


def freed_cost(space: SearchSpace, larger: Mask, smaller: Mask) -> int:
    """What going from `larger` to `smaller` frees, not counting more than the budget needs."""
    cost = space.cost(larger)
    return min(cost - space.cost(smaller), max(cost - space.cap, 0))


def price(increase: float, freed: float) -> float:
    """Loss increase per unit of budget freed; lower is better.

    A decrease is multiplied instead, so that of two equal gains the one that frees more wins. Where
    nothing is freed (sites that share one cache go one by one), it is the increase alone.
    """
    if not freed:
        return increase
    return increase / freed if increase > 0 else increase * freed
