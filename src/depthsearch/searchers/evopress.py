"""Evolution as EvoPress publishes it for dropping sublayers (arXiv 2410.14649, Algorithm 1).

(1 + lambda): the best of a few random masks is the parent; each offspring swaps dropped for kept
sites of the same kind; offspring are thinned out on a little text, and those that are left meet the
parent on all of it. What differs from the published program: the text is the same in every
generation, so the parent's loss is known, and no mask is evaluated twice. Two options give it what
the searches of this package have besides: cheap baselines to start from, and run moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import numpy as np

from depthsearch.searchers.baselines import cheap_baselines
from depthsearch.searchers.moves import Moves
from depthsearch.searchers.options import at_least, within
from depthsearch.searchers.staged import Plan
from depthsearch.space import Batch, Evaluation, Hints, Mask, Proposal, SearchSpace, Stage, Status

Unit = tuple[int, ...]

_MOST_SWAPS = 3
_TRIES_A_MASK = 20
_RUN_MOVES = ("shift", "resize", "split", "merge", "slide")


@dataclass(frozen=True)
class EvoPressOptions:
    """Sizes and stages; the defaults are the published ones for dropping sublayers.

    The `offspring` of a parent are judged on `screen`, a share of the search text (2,048 of 32,768
    tokens), and the best `survivors` of them on all of it. The first parent is the best of
    `initial` random masks on the screening text. The search ends after `generations`; 0 stands for
    the published k (n - k) / 1.5, for k of n units of the kind that has most choices.

    Not published: with `baselines` the first parent is the best of the cheap baselines instead, and
    with `runs` about half of the offspring come from moves of whole stretches of dropped genes.
    """

    offspring: int = 32
    initial: int = 16
    survivors: int = 2
    screen: float = 1 / 16
    generations: int = 0
    baselines: bool = False
    runs: bool = False

    def __post_init__(self) -> None:
        at_least(self, offspring=1, initial=1, survivors=1, generations=0)
        within(self, screen=(0.0, 1.0))


def evopress_plan(
    space: SearchSpace, hints: Hints, rng: np.random.Generator, options: EvoPressOptions
) -> Plan:
    """Random masks that drop as many of each kind, then generations of one parent each."""
    kinds, moves = kinds_of(space), Moves(space, rng)
    seen: set[Mask] = set()
    parent: Evaluation | None = None

    def first() -> tuple[Mask, str]:
        return balanced(space, rng, kinds), "random"

    def child(mask: Mask) -> tuple[Mask, str]:
        if options.runs and rng.random() < 0.5:
            move = _RUN_MOVES[int(rng.integers(len(_RUN_MOVES)))]
            return moves.apply(move, mask, mask) or mask, move
        return switched(space, rng, mask, kinds), "switch"

    def born_of(parent: Evaluation | None) -> list[Proposal]:
        if parent is None:
            return _new(first, options.initial, seen)
        return _new(partial(child, parent.mask), options.offspring, seen)

    born = list(cheap_baselines(space, hints)) if options.baselines else born_of(None)
    seen.update(proposal.mask for proposal in born)
    survivors = 1
    for _ in range(1 + (options.generations or published_generations(born[0].mask, kinds))):
        answers = yield Batch(tuple(born), stages=(Stage(options.screen, survivors),))
        for evaluation in answers.values():
            better = parent is None or evaluation.order < parent.order
            if evaluation.status is Status.OK and better:
                parent = evaluation
        if parent is not None:
            survivors = options.survivors
        born = born_of(parent)
        if not born:
            return


def kinds_of(space: SearchSpace) -> tuple[tuple[Unit, ...], ...]:
    """The genes of the space, those of each kind together."""
    found: dict[tuple[str, ...], list[Unit]] = {}
    for gene in space.genes:
        found.setdefault(tuple(space.sites[i].kind for i in gene), []).append(gene)
    return tuple(tuple(genes) for genes in found.values())


def published_generations(mask: Mask, kinds: Sequence[Sequence[Unit]]) -> int:
    """The published number of generations, k (n - k) / 1.5, for the kind where that is most."""
    choices = [0]
    for genes in kinds:
        gone = sum(not mask.keep[gene[0]] for gene in genes)
        choices.append(gone * (len(genes) - gone))
    return max(1, math.ceil(max(choices) / 1.5))


def balanced(space: SearchSpace, rng: np.random.Generator, kinds: Sequence[Sequence[Unit]]) -> Mask:
    """A random mask on budget that drops as many genes of each kind, as far as the budget lets."""
    orders = [[genes[i] for i in rng.permutation(len(genes))] for genes in kinds]
    mask = space.dense
    for genes in zip_longest(*orders, fillvalue=()):
        if space.fits(mask):
            break
        mask = mask.without([i for gene in genes for i in gene])
    if not (space.fits(mask) and space.contains(mask)):
        return space.repair(mask, rng)
    return space.fill(mask, rng.random(len(space.genes)).tolist())


def switched(
    space: SearchSpace, rng: np.random.Generator, mask: Mask, kinds: Sequence[Sequence[Unit]]
) -> Mask:
    """`mask` with one to three genes swapped, mostly one, each for one of its own kind.

    Where that leaves the budget or the space, it is brought back by random steps.
    """
    for _ in range(int(rng.integers(1, _MOST_SWAPS + 1, 2).min())):
        open_ = [genes for genes in kinds if len({mask.keep[gene[0]] for gene in genes}) == 2]
        if not open_:
            break
        genes = open_[int(rng.integers(len(open_)))]
        kept, gone = ([g for g in genes if mask.keep[g[0]] is flag] for flag in (True, False))
        drop, back = (part[int(rng.integers(len(part)))] for part in (kept, gone))
        mask = mask.without(drop).with_(back)
    return mask if space.on_budget(mask) else space.repair(mask, rng)


def _new(make: Callable[[], tuple[Mask, str]], count: int, seen: set[Mask]) -> list[Proposal]:
    """At most `count` masks that were not made before; fewer where few are left."""
    found: list[Proposal] = []
    for _ in range(_TRIES_A_MASK * count):
        mask, origin = make()
        if mask not in seen:
            seen.add(mask)
            found.append(Proposal(mask, f"evopress {origin}"))
        if len(found) == count:
            break
    return found
