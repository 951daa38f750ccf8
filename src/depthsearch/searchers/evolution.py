"""Evolution over masks on budget, seeded from every cheap baseline.

(mu + lambda) selection as in EvoPress (Alg. 1), with what its landscape asks for: it starts from
the baselines instead of a random mask, moves whole runs of dropped genes beside single swaps, keeps
several parents, and never evaluates a mask twice. Half of each generation is not random: the
exchanges next to the gaps of the best mask, the most promising by the sweep first.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from depthsearch.searchers.baselines import cheap_baselines
from depthsearch.searchers.gaps import added_up, gap_plan
from depthsearch.searchers.moves import Moves, exchange_neighbours, weighted_index
from depthsearch.searchers.oneshot import (
    RemovalRanking,
    rank_removals,
    removal_masks,
    removal_sweep,
)
from depthsearch.searchers.options import at_least, within
from depthsearch.searchers.random import FreshMasks
from depthsearch.searchers.ranking import influence_keys
from depthsearch.searchers.staged import Answers, Plan, best_masks
from depthsearch.space import Batch, Evaluation, Hints, Mask, Proposal, SearchSpace, Stage, Status

TRIES_AN_OFFSPRING = 10
_COMPLETED_WINDOWS = 2
_FORGET = 0.9
_FLOOR = 0.3


@dataclass(frozen=True)
class EvolutionOptions:
    """Size of the population, and what it starts from.

    `parents` masks survive a generation of `offspring`. `sweep` measures every single removal
    first. Of the baselines and of these removals the three quarters that look worst after
    `start_share` of the search text are measured no further (1: no such cut). `longest_gap` (sites,
    0 for none) also measures gaps up to that length and starts from what they add up to, for which
    it takes the sweep on the whole text; `guided` makes moves prefer to drop what looks
    unimportant. Of a generation the better half goes on after a share `screen` of the search text
    (1: no such cut).
    """

    parents: int = 4
    offspring: int = 16
    sweep: bool = True
    guided: bool = True
    longest_gap: int = 0
    start_share: float = 0.25
    screen: float = 0.25

    def __post_init__(self) -> None:
        at_least(self, parents=1, offspring=1, longest_gap=0)
        within(self, start_share=(0.0, 1.0), screen=(0.0, 1.0))


def evolution_plan(
    space: SearchSpace, hints: Hints, rng: np.random.Generator, options: EvolutionOptions
) -> Plan:
    """Baselines, then a sweep of single removals and what it suggests, then generations."""
    fresh, elite = FreshMasks(space, rng), Elite(space, options.parents)
    start = yield from start_plan(space, hints, elite, options)
    keys = start.keys
    for mask in start.asked:
        fresh.add(mask)

    moves = Moves(space, rng, keys if options.guided else None)
    credit = Credit(moves.names)
    exchanges: Iterator[Mask] = iter(())
    best: Mask | None = None
    rest = 0
    while True:
        born: dict[Mask, str] = {}
        if elite.masks and elite.masks[0] != best:
            best = elite.masks[0]
            exchanges = iter(exchange_neighbours(space, best, keys))
        half, rest = divmod(rest + options.offspring, 2)
        while len(born) < half and (exchanged := next(exchanges, None)) is not None:
            if fresh.add(exchanged):
                born[exchanged] = "exchange"
        born |= filled(rng, moves, credit, elite.masks, fresh, options.offspring, len(born))
        if not born:
            return
        children = [Proposal(mask, f"evolution {origin}") for mask, origin in born.items()]
        elite.learn((yield elite.batch(children, options.screen)))
        credit.update(born, elite.masks)


@dataclass(frozen=True)
class Start:
    """What a search starts from: one key a gene (higher is kept), and every mask asked so far."""

    keys: tuple[float, ...]
    asked: tuple[Mask, ...]


def start_plan(
    space: SearchSpace, hints: Hints, elite: Elite, options: EvolutionOptions
) -> Generator[Batch, Answers, Start]:
    """Baselines, a sweep of single removals and what it suggests, gaps added up; `elite` learns."""
    keys = influence_keys(space, hints)
    seeds = cheap_baselines(space, hints)
    elite.learn((yield elite.batch(seeds, options.start_share, one_of=4)))
    if options.sweep and not space.fits(space.dense):
        sweep = removal_sweep(space)
        if not options.longest_gap:
            # The order matters most among the cheapest to lose; the others may be known roughly.
            cheapest = max(options.parents, len(sweep.proposals) // 4)
            stage = Stage(options.start_share, cheapest)
            sweep = Batch(sweep.proposals, cheapest, stages=(stage,))
        answers = yield sweep
        elite.learn(answers)
        ranking = rank_removals(space, hints, answers)
        keys = ranking.keys
        suggested = (*removal_masks(space, ranking), *completions(space, ranking, elite.masks))
        elite.learn((yield elite.batch(suggested)))
        seeds = (*seeds, *sweep.proposals, *suggested)
        if options.longest_gap:
            gaps = yield from gap_plan(space, options.longest_gap, answers)
            together = added_up(space, gaps, keys)
            elite.learn((yield elite.batch(together)))
            seeds = (*seeds, *together)
    return Start(keys, tuple(proposal.mask for proposal in seeds))


class Elite:
    """The best distinct masks on budget that are known at full fidelity."""

    def __init__(self, space: SearchSpace, size: int) -> None:
        self._space = space
        self._size = size
        self._best: list[Evaluation] = []

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The masks, best first."""
        return tuple(evaluation.mask for evaluation in self._best)

    def learn(self, answers: Answers) -> None:
        """Take in what is better; a mask that failed or lost its race never gets in."""
        known = {e.mask: e for e in self._best}
        for mask, evaluation in answers.items():
            if evaluation.status is Status.OK and self._space.on_budget(mask):
                known[mask] = evaluation
        self._best = [known[m] for m in best_masks(tuple(known.values()), self._size)]

    def batch(self, proposals: Sequence[Proposal], screen: float = 1.0, one_of: int = 2) -> Batch:
        """A batch raced against these masks; after `screen` of the text one of `one_of` goes on."""
        best = max(self._size, -(-len(proposals) // one_of))
        stages = (Stage(screen, best),) if screen < 1 and best < len(proposals) else ()
        return Batch(tuple(proposals), self._size, self.masks, stages)


class Credit:
    """How likely each move is drawn: by its recent success, with a floor for every move."""

    def __init__(self, names: Sequence[str]) -> None:
        self._won = dict.fromkeys(names, 0.0)
        self._tried = dict.fromkeys(names, 0.0)

    @property
    def weights(self) -> list[float]:
        """One probability a move."""
        rates = [(1 + self._won[name]) / (4 + self._tried[name]) for name in self._won]
        total = sum(rates)
        return [_FLOOR / len(rates) + (1 - _FLOOR) * rate / total for rate in rates]

    def update(self, born: dict[Mask, str], elite: Sequence[Mask]) -> None:
        """Count the offspring of each move, and those that became parents."""
        for name in self._won:
            children = [mask for mask, origin in born.items() if origin == name]
            won = sum(mask in elite for mask in children)
            self._won[name] = _FORGET * self._won[name] + won
            self._tried[name] = _FORGET * self._tried[name] + len(children)


def completions(
    space: SearchSpace, ranking: RemovalRanking, elite: Sequence[Mask]
) -> tuple[Proposal, ...]:
    """Prefixes of single removals completed by the gap of each of the best masks so far.

    The first quarter, half and three quarters of what single removals would drop, then the gap
    from its front or from its back until the budget is met.
    """
    target = removal_masks(space, ranking)[-1].mask
    needed = [unit for unit in ranking.by_cost if not target.keep[unit[0]]]
    worth = _ranks(ranking.keys)
    found: dict[Mask, str] = {}
    for quarters in (1, 2, 3):
        prefix = {i for unit in needed[: len(needed) * quarters // 4] for i in unit}
        for mask in elite[:_COMPLETED_WINDOWS]:
            gap = [g for g, gene in enumerate(space.genes) if not mask.keep[gene[0]]]
            for order in (gap, gap[::-1]):
                keys = [2.0 + rank for rank in worth]
                for place, gene in enumerate(order):
                    keys[gene] = 1.0 + place / len(order)
                for gene, sites in enumerate(space.genes):
                    if prefix.intersection(sites):
                        keys[gene] = 0.0
                found.setdefault(space.decode(keys), f"completed prefix {quarters}/4 + gap")
    return tuple(Proposal(mask, origin) for mask, origin in found.items())


def _ranks(keys: Sequence[float]) -> list[float]:
    order = sorted(range(len(keys)), key=lambda g: (keys[g], g))
    ranks = [0.0] * len(keys)
    for rank, gene in enumerate(order):
        ranks[gene] = rank / len(keys)
    return ranks


def breed(
    rng: np.random.Generator, moves: Moves, credit: Credit, parents: Sequence[Mask]
) -> tuple[str, Mask | None]:
    """A move drawn by its credit, and what it makes of one of the ranked parents, if anything."""
    move = moves.names[weighted_index(rng, credit.weights)]
    parent, other = (parents[i] for i in _parents(rng, len(parents)))
    return move, moves.apply(move, parent, other)


def filled(
    rng: np.random.Generator,
    moves: Moves,
    credit: Credit,
    parents: Sequence[Mask],
    fresh: FreshMasks,
    offspring: int,
    known: int,
) -> dict[Mask, str]:
    """The new masks that make `known` ones a generation, by move; random ones where moves fail."""
    born: dict[Mask, str] = {}
    tries = TRIES_AN_OFFSPRING * offspring if parents else 0
    while known + len(born) < offspring and tries:
        tries -= 1
        move, child = breed(rng, moves, credit, parents)
        if child is not None and fresh.add(child):
            born[child] = move
    return born | dict.fromkeys(fresh.take(offspring - known - len(born)), "random")


def _parents(rng: np.random.Generator, count: int) -> tuple[int, int]:
    """Two places in the ranked parents, better ones likelier, different where possible."""
    weights = [1 / (1 + place) for place in range(count)]
    first = weighted_index(rng, weights)
    if count == 1:
        return first, first
    weights[first] = 0.0
    return first, weighted_index(rng, weights)
