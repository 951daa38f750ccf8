"""The cheap baselines: masks that need no search, and that every search has to beat."""

from __future__ import annotations

from collections.abc import Iterable

from depthsearch.searchers.ranking import block_influence_keys, influence_keys, per_cost
from depthsearch.space import Hints, Mask, Proposal, SearchSpace

WINDOW = "window"
BLOCK_INFLUENCE = "block influence"
SINGLE_REMOVAL = "single removal"


def is_baseline(origin: str) -> bool:
    """Whether a proposal's origin names a baseline of the literature rather than a search step."""
    return origin.startswith((WINDOW, BLOCK_INFLUENCE, SINGLE_REMOVAL))


def cheap_baselines(space: SearchSpace, hints: Hints) -> tuple[Proposal, ...]:
    """Every mask that one pass of the dense model suggests: windows, then influence rankings."""
    return _distinct((*window_baselines(space, hints), *influence_baselines(space, hints)))


def window_baselines(space: SearchSpace, hints: Hints) -> tuple[Proposal, ...]:
    """All windows of the space, the smallest angular distance across the gap first.

    The first is the window that "The Unreasonable Ineffectiveness of the Deeper Layers" removes.
    Origins say "filled" where sublayers inside a window fitted back into the budget.
    """
    ranked = sorted(space.windows(), key=lambda m: (window_distance(space, m, hints), m.key))
    return tuple(
        Proposal(mask, f"{WINDOW} {span(space, mask)}" + (", best angle" if place == 0 else ""))
        for place, mask in enumerate(ranked)
    )


def influence_baselines(space: SearchSpace, hints: Hints) -> tuple[Proposal, ...]:
    """Block influence (ShortGPT) of sites and of whole blocks, plain and per unit of cost."""
    site, block = influence_keys(space, hints), block_influence_keys(space, hints)
    rankings = {
        f"{BLOCK_INFLUENCE} of blocks": block,
        f"{BLOCK_INFLUENCE} of blocks per cost": per_cost(space, block),
        f"{BLOCK_INFLUENCE} of sites": site,
        f"{BLOCK_INFLUENCE} of sites per cost": per_cost(space, site),
    }
    return _distinct(Proposal(space.decode(keys), origin) for origin, keys in rankings.items())


def window_distance(space: SearchSpace, mask: Mask, hints: Hints) -> float:
    """Angular distance of the residual stream from before a window to behind it.

    Also where something inside the window was put back. Where others lie within that may not go, or
    cost nothing of the budget, the distances across the gaps between them are added up.
    """
    if not mask.dropped:
        return 0.0
    low, high = mask.dropped[0], mask.dropped[-1]
    if len(_within(space, mask)) == high + 1 - low:
        return hints.angular[low][high + 1]
    return sum(hints.angular[start][stop] for start, stop in mask.runs)


def _within(space: SearchSpace, mask: Mask) -> set[int]:
    """The sites from the first to the last dropped one that may go and cost of the budget."""
    return {
        i
        for i in range(mask.dropped[0], mask.dropped[-1] + 1)
        if i in space.free and any(limit.touches((i,)) for limit in space.limits)
    }


def span(space: SearchSpace, mask: Mask) -> str:
    """The dropped stretch for people: "12-18" in whole blocks, else "12.ffn-18.attention".

    With ", filled" behind it where something within the stretch is kept that could be dropped.
    """
    if not mask.dropped:
        return "of nothing"
    return _stretch(space, mask) + (", filled" if _within(space, mask) - {*mask.dropped} else "")


def _stretch(space: SearchSpace, mask: Mask) -> str:
    first, last = space.sites[mask.dropped[0]], space.sites[mask.dropped[-1]]
    several = len({site.stack for site in space.sites}) > 1
    start = f"{first.stack}.{first.block}" if several else f"{first.block}"
    stop = (
        f"{last.stack}.{last.block}" if several and last.stack != first.stack else f"{last.block}"
    )
    if space.granularity == "sublayer" and (first.kind, last.kind) != ("attention", "ffn"):
        return f"{start}.{first.kind}-{stop}.{last.kind}"
    return f"{start}-{stop}"


def _distinct(proposals: Iterable[Proposal]) -> tuple[Proposal, ...]:
    found: dict[Mask, Proposal] = {}
    for proposal in proposals:
        found.setdefault(proposal.mask, proposal)
    return tuple(found.values())
