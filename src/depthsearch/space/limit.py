"""One cost that masks are held to: what a mask costs, what a change of it moves, and the cap.

The functions are about several at once; costs are tuples with one entry a limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from depthsearch.space.cost import SiteCosts
from depthsearch.space.mask import Mask


@dataclass(frozen=True)
class Limit:
    """The costs of one metric, in its own unit, and the largest that is allowed."""

    metric: str
    table: SiteCosts
    cap: int

    def cost(self, mask: Mask) -> int:
        """What the masked model costs."""
        return self.table.of(mask)

    @cached_property
    def dense(self) -> int:
        """What the dense model costs."""
        return self.table.fixed + self.table.blocks

    def weight(self, keep: Sequence[bool], unit: Sequence[int]) -> int:
        """What dropping the kept `unit`, or putting back the dropped one, moves the cost by."""
        total = sum(self.table.sites[i] for i in unit)
        if not self.table.shared:
            return total
        seen: set[int] = set()
        for i in unit:
            for part, indices, amount in self._shared_of.get(i, ()):
                if part not in seen and not any(keep[j] for j in indices if j not in unit):
                    total += amount
                seen.add(part)
        return total

    def touches(self, unit: Sequence[int]) -> bool:
        """Whether dropping `unit` lowers the cost, be it only together with other sites."""
        return any(self.table.sites[i] or i in self._shared_of for i in unit)

    @cached_property
    def _shared_of(self) -> Mapping[int, tuple[tuple[int, tuple[int, ...], int], ...]]:
        """For each site, the shared parts it takes a share in: number, sites, amount."""
        found: dict[int, list[tuple[int, tuple[int, ...], int]]] = {}
        for part, (indices, amount) in enumerate(self.table.shared):
            for i in indices:
                found.setdefault(i, []).append((part, indices, amount))
        return {i: tuple(parts) for i, parts in found.items()}


Limits = Sequence[Limit]


def costs_of(limits: Limits, mask: Mask) -> tuple[int, ...]:
    """What the masked model costs."""
    return tuple(limit.cost(mask) for limit in limits)


def weights(limits: Limits, keep: Sequence[bool], unit: Sequence[int]) -> tuple[int, ...]:
    """What dropping the kept `unit`, or putting back the dropped one, moves each cost by."""
    return tuple(limit.weight(keep, unit) for limit in limits)


def allows(limits: Limits, keep: Sequence[bool], costs: Sequence[int], unit: Sequence[int]) -> bool:
    """Whether `unit` can be put back into `keep`, which costs `costs`, within every cap."""
    pairs = zip(limits, costs, strict=True)
    return all(cost + limit.weight(keep, unit) <= limit.cap for limit, cost in pairs)


def below(costs: Iterable[int], caps: Iterable[int]) -> bool:
    """Whether no cost exceeds its cap."""
    return all(cost <= cap for cost, cap in zip(costs, caps, strict=True))


def excess(limits: Limits, mask: Mask) -> float:
    """By what share of the dense cost the mask exceeds a cap at most; 0 where it fits."""
    return max(max(0, x.cost(mask) - x.cap) / max(1, x.dense) for x in limits)


def cheapest(
    limits: Limits, found: Iterable[list[bool]], places: Sequence[int]
) -> list[list[bool]]:
    """Each of `found` with one of `places` kept besides: those that none beats in every cost."""
    rows: dict[tuple[int, ...], list[bool]] = {}
    for keep in found:
        for place in places:
            larger = list(keep)
            larger[place] = True
            rows.setdefault(costs_of(limits, Mask(tuple(larger))), larger)
    return [
        keep
        for costs, keep in rows.items()
        if not any(other != costs and below(other, costs) for other in rows)
    ]
