"""The search space: which sites may go, what they cost, and the masks that meet the budget.

A mask is *on budget* when it drops only free sites, does not exceed the cap, and nothing dropped
could be put back within it. Every way out of this module that promises a mask on budget builds one
by bounded steps: remove units while over the cap, then put back units while they fit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from depthsearch.errors import BudgetError, MaskError
from depthsearch.space.budget import Budget
from depthsearch.space.cost import CostTable, cost_text
from depthsearch.space.limit import Limit, allows, below, cheapest, costs_of, excess, weights
from depthsearch.space.mask import Mask
from depthsearch.space.packing import is_packable
from depthsearch.space.site import Site

Granularity = Literal["sublayer", "block", "attention", "ffn"]
Unit = tuple[int, ...]

_REPAIR_TRIES = 20


@dataclass(frozen=True)
class SearchSpace:
    """Sites, what may be dropped together, what must stay, and the budget to meet.

    `front` names further budgets that one search serves besides; all else here is about `budget`.
    Raises BudgetError at construction where no mask of the space meets a budget, naming the
    cheapest reachable cost, and MaskError for a space that cannot exist.
    """

    sites: tuple[Site, ...]
    costs: CostTable
    budget: Budget
    granularity: Granularity = "sublayer"
    protected: frozenset[int] = frozenset()
    packable: bool = False
    front: tuple[Budget, ...] = ()

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise MaskError(
                f"unknown granularity '{self.granularity}': expected one of "
                f"{', '.join(get_args(Granularity))}"
            )
        if "blocks" in self.budget.metrics and self.granularity != "block":
            raise BudgetError(
                "a drop_blocks budget counts whole blocks: set 'granularity: block', or use "
                "drop_sites or keep_params"
            )
        if self.packable and self.granularity in ("attention", "ffn"):
            raise MaskError(
                f"a packable space cannot drop only {self.granularity} sublayers: what is kept "
                "would not alternate; set 'granularity: sublayer' or 'block'"
            )
        crossed = any(site.kind == "cross_attention" for site in self.sites)
        if self.packable and (
            (crossed and self.granularity == "sublayer") or not is_packable(self.dense, self.sites)
        ):
            raise MaskError(
                "this model does not alternate attention and FFN sublayers, so a search of them "
                "can't keep to masks that form ordinary blocks: set 'granularity: block' or "
                "'packable: false'"
            )
        for index in self.protected.difference(range(len(self.sites))):
            raise MaskError(
                f"protected site {index} does not exist: the model's sites are 0 to "
                f"{len(self.sites) - 1}"
            )
        if not self.genes:
            raise MaskError("every site is protected: there is nothing to search")
        for limit, budget in zip(self.limits, self.budget.parts, strict=True):
            least, whole = limit.cost(self.smallest()), limit.dense
            if limit.cap < 0:
                raise BudgetError(
                    f"the budget cannot be met: {budget.text}, but of the model's {whole} at most "
                    f"{whole - least} may be: lower the count or protect fewer sites"
                )
            if least > limit.cap:
                allowed, costs, dense = (
                    cost_text(budget.metric, cost) for cost in (limit.cap, least, whole)
                )
                raise BudgetError(
                    f"the budget cannot be met: {budget.text} allows {allowed}, but the cheapest "
                    f"mask of this space costs {costs} ({100 * least / whole:.1f} % of the dense "
                    f"model's {dense}); raise the budget or protect fewer sites"
                )
        caps = {tuple((limit.metric, limit.cap) for limit in p.limits) for p in self.points}
        if len(caps) <= len(self.front):
            raise BudgetError("two budgets of the front allow the same cost: leave one of them out")

    @cached_property
    def points(self) -> tuple[SearchSpace, ...]:
        """The space at each budget, the own one included, a metric's loosest first."""
        budgets = (self.budget, *self.front)
        metrics = list(dict.fromkeys(metric for budget in budgets for metric in budget.metrics))
        found = [replace(self, budget=budget, front=()) for budget in budgets] if self.front else []
        found.sort(key=lambda point: [(metrics.index(x.metric), -x.cap) for x in point.limits])
        return tuple(found) or (self,)

    @cached_property
    def genes(self) -> tuple[Unit, ...]:
        """Groups of sites dropped together, in execution order; protected ones are left out."""
        return tuple(group for group in self._groups if not self.protected.intersection(group))

    @cached_property
    def _groups(self) -> tuple[Unit, ...]:
        if self.granularity == "block":
            members: dict[tuple[str, int], list[int]] = {}
            for site in self.sites:
                members.setdefault((site.stack, site.block), []).append(site.index)
            return tuple(tuple(group) for group in members.values())
        wanted = {
            "sublayer": ("attention", "cross_attention", "ffn"),
            "attention": ("attention", "cross_attention"),
            "ffn": ("ffn",),
        }[self.granularity]
        return tuple((site.index,) for site in self.sites if site.kind in wanted)

    @cached_property
    def free(self) -> frozenset[int]:
        """The sites that may be dropped."""
        return frozenset(i for gene in self.genes for i in gene)

    @cached_property
    def adjoins(self) -> tuple[bool, ...]:
        """For each gene, whether it and the one before it can be of one gap.

        They are of one stack, and nothing protected lies between them.
        """
        return False, *(self._contiguous(g - 1, g + 1) for g in range(1, len(self.genes)))

    @cached_property
    def limits(self) -> tuple[Limit, ...]:
        """What masks are held to: one cost and its cap, or two for a budget of two costs."""
        tables = ((part, part.costs(self.costs, self.sites)) for part in self.budget.parts)
        return tuple(Limit(part.metric, table, part.cap_for(table)) for part, table in tables)

    @cached_property
    def cap(self) -> int:
        """The largest cost allowed, in the unit of the budget's (first) metric."""
        return self.limits[0].cap

    @cached_property
    def dense(self) -> Mask:
        """The mask that keeps everything."""
        return Mask.dense(len(self.sites))

    def cost(self, mask: Mask) -> int:
        """What the masked model costs in the budget's (first) metric."""
        return self.limits[0].cost(mask)

    def fits(self, mask: Mask) -> bool:
        """Whether the mask does not exceed the cap, or either of two."""
        return all(limit.cost(mask) <= limit.cap for limit in self.limits)

    def contains(self, mask: Mask) -> bool:
        """Whether the mask drops only whole free genes and is packable where that is demanded."""
        if len(mask) != len(self.sites) or not self.free.issuperset(mask.dropped):
            return False
        if any(len({mask.keep[i] for i in gene}) > 1 for gene in self.genes):
            return False
        return not self.packable or is_packable(mask, self.sites)

    def on_budget(self, mask: Mask) -> bool:
        """Whether the mask is in the space, fits, and nothing dropped could be put back."""
        return self.contains(mask) and self._maximal(list(mask.keep), costs_of(self.limits, mask))

    def meets(self, mask: Mask) -> bool:
        """Whether the mask is on budget, on the own one or on one of the front."""
        return any(point.on_budget(mask) for point in self.points)

    def removals(self, mask: Mask) -> tuple[Mask, ...]:
        """Every mask one minimal unit smaller that costs less than `mask`.

        Where no single removal lowers the cost (sites that share one cache), every smaller mask.
        """
        return tuple(mask.without(unit) for unit in self.removable(mask))

    def removable(self, mask: Mask) -> list[Unit]:
        """The units that `removals` drops, of ascending sites.

        The unit is a gene; on a packable space of sublayers, two neighbouring kept sites.
        """
        keep = list(mask.keep)
        units = self._removable(keep)
        return [u for u in units if any(x.weight(keep, u) for x in self.limits)] or units

    def additions(self, mask: Mask) -> tuple[Mask, ...]:
        """Every mask of the space one minimal unit larger than `mask`."""
        return tuple(mask.with_(u) for u in self._addable(list(mask.keep)))

    def gaps(self, mask: Mask) -> list[tuple[int, int]]:
        """Runs of dropped sites `(start, stop)`, cut where one stack ends and the next begins."""
        found: list[tuple[int, int]] = []
        for start, stop in mask.runs:
            cuts = [i for i in range(start + 1, stop) if not self._same_stack(i - 1, i)]
            found.extend(pairwise([start, *cuts, stop]))
        return found

    def smallest(self) -> Mask:
        """The cheapest mask of the space, the budget aside; with two costs, one that fits, if any.

        Where none fits both, one that exceeds a cap by the smallest share of the dense cost.
        """
        start = self.dense.without(self.free)
        if not self._pairs:
            return start
        found = [list(start.keep)]
        for first, stop in self.gaps(start):
            if (stop - first) % 2:
                # An odd stretch must keep one site that leaves even runs on both sides.
                found = cheapest(self.limits, found, range(first, stop, 2))
        return min((Mask(tuple(keep)) for keep in found), key=lambda m: excess(self.limits, m))

    def decode(self, keys: Sequence[float]) -> Mask:
        """The mask on budget for one ranking key a gene, higher meaning keep.

        Drops the lowest key first until the cap is met, then puts back what fits, highest first;
        where removing pairs in that order can't meet the cap, it grows the smallest mask instead.
        Every mask on budget is reached by some keys. Raises MaskError for a wrong number of keys.
        """
        value = self._site_keys(keys)
        keep = list(self.dense.keep)
        if not self._shrink(keep, lambda units: min(units, key=lambda u: (_mean(value, u), u))):
            keep = list(self.smallest().keep)
        return self._grow(keep, lambda units: max(units, key=lambda u: (_mean(value, u), u)))

    def fill(self, mask: Mask, keys: Sequence[float]) -> Mask:
        """Put back what fits into a mask within the cap, highest key first; one key a gene."""
        self._demand_length(mask)
        value = self._site_keys(keys)
        return self._grow(
            list(mask.keep), lambda units: max(units, key=lambda u: (_mean(value, u), u))
        )

    def repair(
        self, mask: Mask, rng: np.random.Generator, avoid: frozenset[int] = frozenset()
    ) -> Mask:
        """The nearest on-budget mask by random steps: removals over the cap, then put-backs.

        Sites in `avoid` are put back only when nothing else fits. Raises MaskError for a mask over
        another number of sites.
        """
        self._demand_length(mask)
        start = self._into_space(mask)

        def any_of(units: Sequence[Unit]) -> Unit:
            return units[int(rng.integers(len(units)))]

        def wanted(units: Sequence[Unit]) -> Unit:
            return any_of([u for u in units if not avoid.intersection(u)] or units)

        for _ in range(_REPAIR_TRIES):
            keep = list(start.keep)
            if self._shrink(keep, any_of):
                return self._grow(keep, wanted)
        return self._grow(list(self.smallest().keep), wanted)

    def windows(self) -> tuple[Mask, ...]:
        """Every contiguous run of genes that meets the budget, shortest from each start.

        On a packable space of sublayers only runs of even length. Each is then trimmed so that it
        is on budget: from its ends, and inside where a lighter sublayer still fits and neither end
        does. A run that has to skip a protected site, or to leave its stack, is left out.
        """
        found: dict[Mask, None] = {}
        count, step = len(self.genes), 2 if self._pairs else 1
        for start in range(count):
            mask = self.dense
            for stop in range(start + step, count + 1, step):
                run = [i for gene in self.genes[start:stop] for i in gene]
                mask = self.dense.without(run)
                if not self._contiguous(start, stop):
                    break
                if self.fits(mask):
                    if self.contains(mask):
                        found[self._trim(mask)] = None
                    break
        return tuple(found)

    def enumerate(self, limit: int = 5000) -> tuple[Mask, ...] | None:
        """All masks on budget in a fixed order, or None where they are more than `limit`.

        Also None where listing them would take too many steps, which bounds the time to a few
        seconds.
        """
        if self.fits(self.dense):
            return (self.dense,)
        most = 20 * limit + 20_000
        found = self._listed_by_pairs(limit, most) if self._pairs else self._listed(limit, most)
        return None if found is None or len(found) > limit else tuple(found)

    def _listed(self, limit: int, most: int) -> list[Mask] | None:
        """Masks on budget of a space of genes, gene by gene; None where that takes too long."""
        found: list[Mask] = []
        steps, keep = 0, list(self.dense.keep)
        caps = [each.cap for each in self.limits]
        # What no limit counts can always be put back, so no mask on budget drops it.
        genes = [gene for gene in self.genes if any(each.touches(gene) for each in self.limits)]
        # By cost: what the genes from each place on could still free, and what one put-back takes
        # at most.
        reach, step = [], []
        for each in self.limits:
            single = [each.weight(keep, gene) for gene in genes]
            shared = sum(
                amount
                for indices, amount in each.table.shared
                if not any(set(gene).issuperset(indices) for gene in genes)
            )
            reach.append([sum(single[place:]) + shared for place in range(len(single) + 1)])
            step.append(max(single) + shared)

        def visit(place: int, costs: tuple[int, ...]) -> bool:
            nonlocal steps
            steps += 1
            if steps > most or len(found) > limit:
                return False
            left = zip(costs, caps, reach, strict=True)
            if any(cost - freed[place] > cap for cost, cap, freed in left):
                return True
            if below([cost + taken for cost, taken in zip(costs, step, strict=True)], caps):
                return True
            if place == len(genes):
                mask = Mask(tuple(keep))
                if self.contains(mask) and self._maximal(keep, costs):
                    found.append(mask)
                return True
            gene = genes[place]
            if not visit(place + 1, costs):
                return False
            freed = weights(self.limits, keep, gene)
            _set(keep, gene, False)
            complete = visit(place + 1, tuple(a - b for a, b in zip(costs, freed, strict=True)))
            _set(keep, gene, True)
            return complete

        return found if visit(0, costs_of(self.limits, self.dense)) else None

    def _listed_by_pairs(self, limit: int, most: int) -> list[Mask] | None:
        """Masks on budget of a space of pairs, pair by pair; None where that takes too long.

        Whatever is larger than a mask on budget is over a cap, so that each is found by removals
        from masks over a cap alone.
        """
        caps = [each.cap for each in self.limits]
        found: list[Mask] = []
        queue = [(self.dense.keep, costs_of(self.limits, self.dense))]
        seen, steps = {self.dense.keep}, 0
        while queue:
            kept, costs = queue.pop()
            keep = list(kept)
            for unit in self._removable(keep):
                steps += 1
                if steps > most or len(found) > limit:
                    return None
                freed = weights(self.limits, keep, unit)
                smaller = list(keep)
                _set(smaller, unit, False)
                key = tuple(smaller)
                if key in seen:
                    continue
                seen.add(key)
                left = tuple(a - b for a, b in zip(costs, freed, strict=True))
                if not below(left, caps):
                    queue.append((key, left))
                elif self._maximal(smaller, left):
                    found.append(Mask(key))
        return sorted(found, key=lambda mask: mask.key, reverse=True)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the space as JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "sites": [site.to_json() for site in self.sites],
            "granularity": self.granularity,
            "protected": sorted(self.protected),
            "packable": self.packable,
            "budget": self.budget.to_json(),
            "costs": self.costs.to_json(),
            **({"front": [budget.to_json() for budget in self.front]} if self.front else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SearchSpace:
        """Rebuild from `to_json`."""
        return cls(
            sites=tuple(Site.from_json(site) for site in data["sites"]),
            costs=CostTable.from_json(data["costs"]),
            budget=Budget.from_json(data["budget"]),
            granularity=data["granularity"],
            protected=frozenset(int(i) for i in data["protected"]),
            packable=bool(data["packable"]),
            front=tuple(Budget.from_json(budget) for budget in data.get("front", ())),
        )

    @property
    def _pairs(self) -> bool:
        """Whether the minimal unit is a pair of sites rather than a gene."""
        return self.packable and self.granularity == "sublayer"

    def _site_keys(self, keys: Sequence[float]) -> dict[int, float]:
        if len(keys) != len(self.genes):
            raise MaskError(
                f"expected one key for each of {len(self.genes)} genes: got {len(keys)}"
            )
        return {i: float(k) for gene, k in zip(self.genes, keys, strict=True) for i in gene}

    def _demand_length(self, mask: Mask) -> None:
        if len(mask) != len(self.sites):
            raise MaskError(f"got a mask of {len(mask)} sites: the space has {len(self.sites)}")

    def _contiguous(self, start: int, stop: int) -> bool:
        """Whether genes `start` to `stop - 1` are of one stack with no protected group between."""
        run = self.genes[start:stop]
        first = self._groups.index(run[0])
        unbroken = self._groups[first : first + len(run)] == run
        return unbroken and self._same_stack(run[0][0], run[-1][-1])

    def _into_space(self, mask: Mask) -> Mask:
        """The mask with protected sites back, broken genes whole, and, for pairs, even runs."""
        mask = mask.with_(i for i in range(len(mask)) if i not in self.free)
        mask = mask.with_(i for gene in self.genes if any(mask.keep[g] for g in gene) for i in gene)
        if self._pairs:
            mask = mask.with_(stop - 1 for start, stop in self.gaps(mask) if (stop - start) % 2)
        return mask

    def _trim(self, mask: Mask) -> Mask:
        """Put back what fits, ends of the dropped run first; inside, what is nearest to an end."""
        keep = list(mask.keep)

        def nearest_end(units: Sequence[Unit]) -> Unit:
            left = [i for i, kept in enumerate(keep) if not kept]
            count = len(units[0])
            ends = {tuple(left[:count]), tuple(left[-count:]), (left[0], left[-1])}

            def order(unit: Unit) -> tuple[bool, int, int]:
                return unit not in ends, min(unit[0] - left[0], left[-1] - unit[-1]), -unit[0]

            return min(units, key=order)

        return self._grow(keep, nearest_end)

    def _removable(self, keep: list[bool]) -> list[Unit]:
        if not self._pairs:
            return [gene for gene in self.genes if keep[gene[0]]]
        kept = [i for i, k in enumerate(keep) if k]
        return [
            (a, b)
            for a, b in pairwise(kept)
            if a in self.free and b in self.free and self._same_stack(a, b)
        ]

    def _addable(self, keep: list[bool]) -> list[Unit]:
        if not self._pairs:
            return [gene for gene in self.genes if not keep[gene[0]]]
        return [
            (p, q)
            for start, stop in self.gaps(Mask(tuple(keep)))
            for p in range(start, stop, 2)
            for q in range(p + 1, stop, 2)
        ]

    def _same_stack(self, a: int, b: int) -> bool:
        return self.sites[a].stack == self.sites[b].stack

    def _maximal(self, keep: list[bool], costs: Sequence[int]) -> bool:
        """Whether `keep`, which costs `costs`, fits and no unit could be put back."""
        return below(costs, [limit.cap for limit in self.limits]) and not any(
            allows(self.limits, keep, costs, unit) for unit in self._addable(keep)
        )

    def _shrink(self, keep: list[bool], choose: Callable[[Sequence[Unit]], Unit]) -> bool:
        costs = costs_of(self.limits, Mask(tuple(keep)))
        while over := [x for x, cost in zip(self.limits, costs, strict=True) if cost > x.cap]:
            units = self._removable(keep)
            if len(self.limits) > 1:
                # What only lowers a cost that is met would be dropped for nothing.
                units = [unit for unit in units if any(limit.touches(unit) for limit in over)]
            if not units:
                return False
            unit = choose(units)
            freed = weights(self.limits, keep, unit)
            costs = tuple(a - b for a, b in zip(costs, freed, strict=True))
            _set(keep, unit, False)
        return True

    def _grow(self, keep: list[bool], choose: Callable[[Sequence[Unit]], Unit]) -> Mask:
        costs = costs_of(self.limits, Mask(tuple(keep)))
        while units := [u for u in self._addable(keep) if allows(self.limits, keep, costs, u)]:
            unit = choose(units)
            taken = weights(self.limits, keep, unit)
            costs = tuple(a + b for a, b in zip(costs, taken, strict=True))
            _set(keep, unit, True)
        return Mask(tuple(keep))


def _set(keep: list[bool], unit: Iterable[int], value: bool) -> None:
    for i in unit:
        keep[i] = value


def _mean(value: Mapping[int, float], unit: Unit) -> float:
    return sum(value[i] for i in unit) / len(unit)
