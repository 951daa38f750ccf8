"""What evaluations may cost at most, before anything is computed, and what a limit allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from depthsearch.errors import ConfigError
from depthsearch.evaluation import Backend, Racing
from depthsearch.run.points import Finalists
from depthsearch.searchers import is_baseline, needs_sensitivity, offers_baselines
from depthsearch.space import Batch, Mask, Proposal, SearchSpace, Stage

_FEWEST_FINALISTS = 4
"""So many at least, besides those that are safe, are judged on all of the fresh text."""


@dataclass(frozen=True)
class Plan:
    """What to search with: method, options, seed, limits on cost, and finalists to re-rank.

    `cost_tokens` bounds everything: hints, search and finals. After `patience` masks on budget in a
    row that were no better than what was known the search ends. `ask` bounds the masks of one ask.
    So many of the best `baselines` are among the finalists, whatever their rank. `texts` are the
    settings of how much text it takes, those that cost most first.
    """

    method: str
    options: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0
    cost_tokens: float | None = None
    max_evaluations: int | None = None
    patience: int | None = None
    finalists: int = 16
    racing: Racing | Literal[False] = field(default_factory=Racing)
    ask: int | None = None
    baselines: int = 1
    texts: tuple[str, ...] = ("calibration.select_tokens", "calibration.finals_tokens")


class Purse:
    """What a search with a plan may still ask for."""

    def __init__(self, plan: Plan, space: SearchSpace, select: Backend, finals: Backend) -> None:
        self._plan = plan
        self._front = space.front
        self._select = select
        self._finals = finals
        self._least = _least_finals(plan, space, finals)
        self._prices: dict[Mask, float] = {}

    def affordable(
        self,
        batch: Batch,
        spent: float,
        known: int,
        finalists: Callable[[], Finalists],
        begun: bool,
    ) -> Batch:
        """The batch cut to what the limits still allow, which may be nothing.

        So much is `spent` on so many `known` masks, of which `finalists` tells who would be judged
        by now. A batch that would be cut to less than a quarter for its cost ends the search
        instead if it has `begun` to have masks on budget: a handful of masks shares no prefixes, so
        its evaluations are dear.
        """
        plan, proposals = self._plan, batch.proposals
        if plan.max_evaluations is not None:
            proposals = proposals[: max(0, plan.max_evaluations - known)]
        if plan.cost_tokens is not None:
            left = plan.cost_tokens - spent
            masks = [proposal.mask for proposal in proposals]
            reserves = self._reserves(finalists(), proposals)
            low, high = 0, len(proposals)
            while low < high:
                middle = (low + high + 1) // 2
                stages = self._stages(batch, middle)
                cost = planned(self._select, masks[:middle], stages) + reserves[middle]
                low, high = (middle, high) if cost <= left else (low, middle - 1)
            small = begun and 4 * low < len(proposals)
            proposals = proposals[: 0 if small else low]
        stages = self._stages(batch, len(proposals))
        return Batch(proposals, batch.survivors, batch.rivals, stages)

    def finals_cost(self, masks: Sequence[Mask], needed: int) -> float:
        """The most that judging these finalists may cost."""
        return planned(self._finals, masks, self.final_stages(len(masks), needed))

    def final_stages(self, count: int, needed: int) -> tuple[Stage, ...]:
        """The cuts of so many finalists on fresh text, the first `needed` of whom are safe.

        The better half goes on after a quarter of it, and half of these after half of it. Without
        races nobody is cut, nor where several budgets are asked for, whose masks don't compete.
        """
        if not self._plan.racing or self._front:
            return ()
        least = needed + _FEWEST_FINALISTS
        shares = {1 / 4: max(least, -(-count // 2)), 1 / 2: max(least, -(-count // 4))}
        return tuple(Stage(share, left) for share, left in shares.items() if left < count)

    def _stages(self, batch: Batch, count: int) -> tuple[Stage, ...]:
        """The cuts of the race for that many masks, else the searcher's own of `batch`.

        Without races a batch that may be raced isn't cut either; one that is only cut still is.
        """
        racing = self._plan.racing
        if not racing:
            return () if batch.survivors is not None else batch.stages
        return racing.stages(count, batch.survivors, self._select.sequences) or batch.stages

    def _reserves(self, finalists: Finalists, proposals: Sequence[Proposal]) -> list[float]:
        """What the finals may cost once the first 0, 1, ... of `proposals` are known as well.

        That of the finalists by now, and at least that of those who are judged there whatever the
        limit: each of them, or the dearest of the proposals that may take its place.
        """
        now = self.finals_cost(finalists.masks, finalists.needed)
        prices = [[self._final_price(mask) for mask in head] for head in finalists.heads]
        new, safe, count = 0.0, 0.0, 0
        reserves = []
        for proposal in (None, *proposals):
            if proposal is not None and proposal.final:
                price = self._final_price(proposal.mask)
                new = max(new, price)
                if is_baseline(proposal.origin):
                    safe, count = max(safe, price), count + 1
            least = 0.0
            for head in prices:
                more = min(count, self._plan.baselines - len(head[1:]))
                first = 0.0 if head else self._least
                least += max(first, _heads_price(head, new, safe, more))
            reserves.append(self._finals.preparation + max(now, least))
        return reserves

    def _final_price(self, mask: Mask) -> float:
        """The most that judging a mask on the fresh text costs by itself."""
        if mask not in self._prices:
            self._prices[mask] = self._finals.plan([mask])
        return self._prices[mask]


def check_cost(plan: Plan, space: SearchSpace, select: Backend, finals: Backend) -> None:
    """Refuse a cost limit too low for hints, one mask and the finals; raises ConfigError."""
    if plan.cost_tokens is None:
        return
    dense = [space.dense]
    # Hints run the dense model on at most all of the text, and its attentions twice.
    least = select.preparation + 3 * select.plan(dense)
    if needs_sensitivity(plan.method):
        # Twice forwards, and backwards with its attentions twice.
        least += 4 * select.plan(dense)
    least += finals.preparation + len(space.points) * _least_finals(plan, space, finals)
    if plan.cost_tokens < least:
        raise ConfigError(
            f"search.cost_tokens is {plan.cost_tokens:,.0f}, too little for one pass of the dense "
            f"model, a mask and the final ranking: give at least {least:,.0f}, or lower "
            f"{' and '.join(plan.texts)}"
        )


def _finalist(space: SearchSpace, finals: Backend) -> float:
    """What a finalist costs at least, in `cost_tokens`.

    Where masks are repaired the first window may cost many times what the dense model does, which
    has no gap to refit behind.
    """
    masks = (space.dense, *space.windows()[:1])
    return max(finals.plan([mask]) for mask in masks)


def _heads_price(prices: Sequence[float], new: float, safe: float, more: int) -> float:
    """The most that the best mask of a budget and its best baselines may come to cost.

    By now they cost `prices`, the best mask first. Of the masks that are about to be known each
    costs at most `new`, each baseline at most `safe`, and at most `more` of these are added.
    """
    best = max([*prices[:1], new])
    return best + sum(max(price, safe) for price in prices[1:]) + more * safe


def planned(backend: Backend, masks: Sequence[Mask], stages: Sequence[Stage] = ()) -> float:
    """The most that evaluating these may cost, with what `stages` are sure to save."""
    whole = backend.plan(masks)
    if not stages or not masks:
        return whole
    # A survivor alone shares nothing: what each would cost then bounds what all of them do.
    alone = max(backend.plan([mask]) - backend.once([mask]) for mask in masks)
    batches, cost = backend.sequences, backend.once(masks)
    rate, done = whole - cost, 0
    cuts = list(stages)
    for count in batches:
        cost += rate * count / sum(batches)
        done += count
        while cuts and cuts[0].share * sum(batches) <= done:
            rate = min(rate, cuts.pop(0).survivors * alone)
    return cost


def _least_finals(plan: Plan, space: SearchSpace, finals: Backend) -> float:
    """What the finals of a budget cost at least: the best mask, and a baseline if there may be."""
    return (1 + offers_baselines(plan.method)) * _finalist(space, finals)
