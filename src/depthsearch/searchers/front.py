"""Evolution at several budgets at once: a niche of masks for each, and what it learns shared.

One niche a budget holds the best masks known there and breeds as `evolution` does. What niches
share makes them cheaper together than searches one by one: the sweep of single removals, every
evaluation that suits several budgets, where the best windows lie, and masks that migrate: what is
good at 80 % is a start at 75 %, with some more dropped, and the other way round. The niches keep
worse but smaller masks apart from better but larger ones, as the map of elites does ("Illuminating
search spaces by mapping elites", arXiv 1504.04909).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from depthsearch.searchers.baselines import influence_baselines, window_baselines
from depthsearch.searchers.evolution import (
    TRIES_AN_OFFSPRING,
    Credit,
    Elite,
    completions,
)
from depthsearch.searchers.moves import Moves, exchange_neighbours, weighted_index
from depthsearch.searchers.oneshot import rank_removals, removal_masks
from depthsearch.searchers.options import at_least, within
from depthsearch.searchers.protocol import propose
from depthsearch.searchers.random import FreshMasks
from depthsearch.searchers.ranking import influence_keys, reference_of
from depthsearch.searchers.staged import Answers, Plan
from depthsearch.space import Batch, Evaluation, Hints, Mask, Proposal, SearchSpace

T = TypeVar("T")

MIGRANT = "migrant"


@dataclass(frozen=True)
class FrontOptions:
    """Size of a niche, and what the niches start from.

    `parents` masks survive a generation of `offspring`, which belongs to one budget; budgets take
    turns. `sweep` measures every single removal once for all; `guided` makes moves prefer to drop
    what looks unimportant. The own budget of the space tries all its windows, every other one this
    share of its own (`windows`): those nearest to where the best ones were so far.
    """

    parents: int = 4
    offspring: int = 16
    sweep: bool = True
    guided: bool = True
    windows: float = 0.25

    def __post_init__(self) -> None:
        at_least(self, parents=1, offspring=1)
        within(self, windows=(0.0, 1.0))


def front_plan(
    space: SearchSpace, hints: Hints, rng: np.random.Generator, options: FrontOptions
) -> Plan:
    """Baselines of every budget, one sweep and what it suggests, then generations in turn."""
    points = space.points
    niches = [Niche(point, hints, rng, options, alone=len(points) == 1) for point in points]
    yield from _baselines(space, hints, niches, options)
    if options.sweep and not all(niche.space.fits(space.dense) for niche in niches):
        yield from _sweep(space, hints, niches, options)
    for niche in niches:
        niche.guide(options.guided)
    idle, turn = 0, 0
    while idle < len(niches):
        niche = niches[turn % len(niches)]
        turn += 1
        born = niche.offspring(options.offspring, _neighbours(niche, niches))
        idle = 0 if born else idle + 1
        if born:
            proposals = [Proposal(mask, f"front {move}") for mask, move in born.items()]
            yield from _judge(niche, niches, proposals)
            niche.credit.update(born, niche.elite.masks)


class Niche:
    """The masks of one budget: the best so far, and how new ones are made from them."""

    def __init__(
        self,
        space: SearchSpace,
        hints: Hints,
        rng: np.random.Generator,
        options: FrontOptions,
        *,
        alone: bool,
    ) -> None:
        self.space = space
        self.elite = Elite(space, options.parents)
        self.fresh = FreshMasks(space, rng)
        self.moves = Moves(space, rng)
        self._names = self.moves.names if alone else (*self.moves.names, MIGRANT)
        self.credit = Credit(self._names)
        self.keys = influence_keys(space, hints)
        self._rng = rng
        self._best: Mask | None = None
        self._exchanges: Iterator[Mask] = iter(())

    def learn(self, answers: Answers) -> None:
        """Take in what any niche asked for; what is on this budget may join the best."""
        self.elite.learn(answers)
        for mask in answers:
            self.fresh.add(mask)

    def guide(self, guided: bool) -> None:
        """Let the keys known by now guide the moves."""
        if guided:
            self.moves.guide(self.keys)

    def offspring(self, count: int, neighbours: Sequence[Niche]) -> dict[Mask, str]:
        """At most `count` new masks on this budget, by the move that made them.

        Up to half are exchanges next to the gaps of the best mask, as in `evolution`; the others
        come from moves on the best masks here, or on a neighbour's brought onto this budget.
        """
        elite, born = self.elite.masks, dict[Mask, str]()
        if elite and elite[0] != self._best:
            self._best = elite[0]
            self._exchanges = iter(exchange_neighbours(self.space, elite[0], self.keys))
        for mask in self._exchanges:
            if self.fresh.add(mask):
                born[mask] = "exchange"
            if len(born) >= count // 2:
                break
        sources = [niche.elite.masks for niche in neighbours if niche.elite.masks]
        tries = TRIES_AN_OFFSPRING * count if elite or sources else 0
        while len(born) < count and tries:
            tries -= 1
            move, child = self._breed(elite, sources)
            if child is not None and self.fresh.add(child):
                born[child] = move
        return born | dict.fromkeys(self.fresh.take(count - len(born)), "random")

    def _breed(
        self, elite: Sequence[Mask], sources: Sequence[Sequence[Mask]]
    ) -> tuple[str, Mask | None]:
        """A child by a move drawn by its credit; a migrant where the niche is still empty."""
        move = self._names[weighted_index(self._rng, self.credit.weights)] if elite else MIGRANT
        if move == MIGRANT:
            # Nearer budgets and better masks are likelier.
            source = self._ranked(self._ranked(sources)) if sources else None
            return MIGRANT, None if source is None else self.moves.migrate(source)
        parent = self._ranked(elite)
        others = [mask for mask in elite if mask != parent] or [parent]
        return move, self.moves.apply(move, parent, self._ranked(others))

    def _ranked(self, choices: Sequence[T]) -> T:
        """One of the choices, which are in order, the first ones likelier."""
        return choices[weighted_index(self._rng, [1 / (1 + i) for i in range(len(choices))])]


def _neighbours(niche: Niche, niches: Sequence[Niche]) -> list[Niche]:
    """The other niches, those first whose best mask needs the smallest change of cost here."""
    space = niche.space

    def distance(place: int) -> tuple[float, int]:
        mask = next(iter(niches[place].elite.masks), space.dense)
        away = (abs(x.cost(mask) - x.cap) / max(x.dense, 1) for x in space.limits)
        return max(away), place

    return [niches[i] for i in sorted(range(len(niches)), key=distance) if niches[i] is not niche]


def _judge(
    niche: Niche, niches: Sequence[Niche], proposals: Sequence[Proposal]
) -> Generator[Batch, Answers, Answers]:
    """Ask for masks of one niche, raced against its best; every niche learns the answers."""
    answers = yield niche.elite.batch(proposals)
    for other in niches:
        other.learn(answers)
    return answers


def _baselines(
    space: SearchSpace, hints: Hints, niches: Sequence[Niche], options: FrontOptions
) -> Plan:
    """The cheapest baselines of every budget, so that each has a mask soon; then windows."""
    windows = [window_baselines(niche.space, hints) for niche in niches]
    known: dict[Mask, Evaluation] = {}
    for niche, mine in zip(niches, windows, strict=True):
        first = (*mine[:1], *influence_baselines(niche.space, hints))
        known |= yield from _judge(niche, niches, first)
    own = next(i for i, niche in enumerate(niches) if niche.space.budget == space.budget)
    # Outwards from the own budget, so that each learns from one that is near.
    for place in sorted(range(len(niches)), key=lambda i: (abs(i - own), i)):
        count = len(windows[place])
        if place != own:
            count = max(1, round(options.windows * count))
        seen = {mask: known[mask] for mine in windows for p in mine if (mask := p.mask) in known}
        chosen = promising(windows[place], seen)[:count]
        known |= yield from _judge(niches[place], niches, chosen)


def promising(windows: Sequence[Proposal], known: Mapping[Mask, Evaluation]) -> list[Proposal]:
    """Windows ordered by what the known windows with the nearest centres have lost.

    Those that lost their race are compared on the sequences that they have in common with others.
    """
    if not known:
        return list(windows)
    reference = reference_of(known.values())

    def expected(proposal: Proposal) -> tuple[int, float, float]:
        centre = _centre(proposal.mask)
        away, rank, loss = min(
            (abs(_centre(e.mask) - centre), e.order[0], e.estimate(reference))
            for e in known.values()
        )
        return rank, loss, away

    return sorted(windows, key=expected)


def _centre(mask: Mask) -> float:
    return (mask.dropped[0] + mask.dropped[-1]) / 2 if mask.dropped else 0.0


def _sweep(
    space: SearchSpace, hints: Hints, niches: Sequence[Niche], options: FrontOptions
) -> Plan:
    """Every single removal that frees something of a budget, once; then what it suggests.

    Those that meet a budget already race there, at the tightest such budget, and the others race
    among themselves.
    """
    units = [niche.space.removals(space.dense) for niche in niches]
    masks = {space.dense: "dense"} | {mask: "sweep" for found in units for mask in found}
    sweep = [propose(space, mask, origin) for mask, origin in masks.items()]
    answers: dict[Mask, Evaluation] = {}
    for niche in reversed(niches):
        mine = [proposal for proposal in sweep if niche.space.on_budget(proposal.mask)]
        answers |= yield from _judge(niche, niches, mine)
    larger = tuple(proposal for proposal in sweep if not proposal.final)
    # The order matters most among the cheapest to lose; the others may be known roughly.
    answers |= yield Batch(larger, max(options.parents, len(larger) // 4))
    for niche in niches:
        niche.learn(answers)
    for niche, removals in zip(niches, units, strict=True):
        measured = {space.dense, *removals}
        ranking = rank_removals(
            niche.space, hints, {mask: e for mask, e in answers.items() if mask in measured}
        )
        niche.keys = ranking.keys
        suggested = (
            *removal_masks(niche.space, ranking),
            *completions(niche.space, ranking, niche.elite.masks),
        )
        yield from _judge(niche, niches, suggested)
