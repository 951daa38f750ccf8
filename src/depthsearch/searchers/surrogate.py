"""Surrogate-assisted evolution: a regression screens many offspring, few of them are measured.

It starts as `evolution` does. Then every generation fits the log-losses of all masks on budget
that were measured so far (`regression.py`), lets the moves of the evolution make many offspring of
the best masks, measured or only predicted, and measures those with the lowest confidence bounds
(as surveyed in Jin, "Surrogate-assisted evolutionary computation", 2011). A batch is chosen one by
one, each choice taken as if it had been measured at its mean (GP-BUCB: Desautels, Krause and
Burdick, arXiv 1206.6402, Alg. 1), which lowers the worth of what is close to it. A quarter of each
batch is not screened, so that a wrong model can't lead the search astray for good.

It is the default: among free masks of SmolLM2-135M it came to a low search loss for fewer tokens
with most seeds; on held-out text no difference to plain evolution is shown
(`benchmarks/README.md`).
On synthetic losses over 60 sites it wins or ties, and rarely loses; a part of that lead is owed to
those losses, which charge a gap much as one of its figures does.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from depthsearch.searchers.evolution import (
    TRIES_AN_OFFSPRING,
    Credit,
    Elite,
    EvolutionOptions,
    Start,
    breed,
    filled,
    start_plan,
)
from depthsearch.searchers.moves import Moves, exchange_neighbours
from depthsearch.searchers.options import at_least
from depthsearch.searchers.random import FreshMasks
from depthsearch.searchers.regression import Array, MaskFeatures, MaskRegression, observe
from depthsearch.searchers.staged import Answers, Plan
from depthsearch.space import Batch, Evaluation, Hints, Mask, Proposal, SearchSpace, Status

_UNSCREENED = 4
"""One of so many offspring is made as plain evolution makes it."""
_NEW = 4
"""One of so many candidates is new; the others were not good enough before."""
_PREDICTED_PARENTS = 16
_SHORTLIST = 256
_FEWEST_OBSERVED = 8
_DIGITS = 6
"""Predictions are compared to so many digits, so that rounding errors do not decide."""


@dataclass(frozen=True)
class SurrogateOptions(EvolutionOptions):
    """Size of the population, of what is screened for it, and what it starts from.

    `parents` masks survive a generation of `offspring`, most of which are the most promising of
    `candidates`; `optimism` is how many standard deviations below its mean a candidate is judged
    (0: by its mean alone). The others are those of `evolution`.
    """

    candidates: int = 2000
    optimism: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, candidates=1, optimism=0.0)


def surrogate_plan(
    space: SearchSpace, hints: Hints, rng: np.random.Generator, options: SurrogateOptions
) -> Plan:
    """The start of the evolution, then generations most of whose offspring were screened."""
    fresh, elite = FreshMasks(space, rng), Elite(space, options.parents)
    measured: dict[Mask, Evaluation] = {}
    start = yield from _recorded(start_plan(space, hints, elite, options), space, measured)
    for mask in start.asked:
        fresh.add(mask)

    moves = Moves(space, rng, start.keys if options.guided else None)
    credit = Credit(moves.names)
    features = MaskFeatures(space, start.keys)
    pool = Pool(space, moves, credit, rng, start.keys, options)
    rest = 0
    while True:
        born: dict[Mask, str] = {}
        origins: dict[Mask, str] = {}
        seen = observe(tuple(measured.values()))
        complete = sum(e.status is Status.OK for e in measured.values())
        if elite.masks and complete >= _FEWEST_OBSERVED:
            pool.refresh(MaskRegression(features, seen), elite.masks, fresh)
            unscreened, rest = divmod(rest + options.offspring, _UNSCREENED)
            for mask, move in pool.take(options.offspring - unscreened).items():
                fresh.add(mask)
                born[mask] = move
                origins[mask] = f"surrogate {move}"
        plain = filled(rng, moves, credit, elite.masks, fresh, options.offspring, len(born))
        born |= plain
        origins |= {mask: f"evolution {move}" for mask, move in plain.items()}
        if not born:
            return
        children = [Proposal(mask, origin) for mask, origin in origins.items()]
        answers = yield elite.batch(children, options.screen)
        _record(answers, space, measured)
        elite.learn(answers)
        credit.update(born, elite.masks)


class Pool:
    """Candidates that were made but not measured, and how they look to the regression."""

    def __init__(
        self,
        space: SearchSpace,
        moves: Moves,
        credit: Credit,
        rng: np.random.Generator,
        keys: Sequence[float],
        options: SurrogateOptions,
    ) -> None:
        self._space, self._moves, self._credit, self._rng = space, moves, credit, rng
        self._keys = keys
        self._options = options
        self._move_of: dict[Mask, str] = {}
        self._ranked: list[Mask] = []
        self._center: Mask | None = None
        self._model: MaskRegression | None = None

    def refresh(self, model: MaskRegression, elite: Sequence[Mask], fresh: FreshMasks) -> None:
        """Add new candidates: children of the elite, then of what the model expects to be best."""
        self._model = model
        self._move_of = {m: move for m, move in self._move_of.items() if m not in fresh}
        if elite[0] != self._center:
            self._center = elite[0]
            for mask in exchange_neighbours(self._space, elite[0], self._keys):
                if mask not in fresh:
                    self._move_of.setdefault(mask, "exchange")
        new = -(-self._options.candidates // _NEW)
        self._breed(elite, -(-new // 2), fresh)
        self._rank()
        if self._ranked:
            self._breed(self._ranked[:_PREDICTED_PARENTS], new // 2, fresh)
            self._rank()

    def take(self, count: int) -> dict[Mask, str]:
        """At most `count` of the candidates and the moves that made them, and forget these."""
        if self._model is None or not self._ranked:
            return {}
        short = self._ranked[: max(_SHORTLIST, count)]
        chosen = choose(
            self._model.mean(short),
            self._model.covariance(short),
            [mask.key for mask in short],
            count,
            self._options.optimism,
            self._model.noise,
        )
        return {short[i]: self._move_of.pop(short[i]) for i in chosen}

    def _breed(self, parents: Sequence[Mask], count: int, fresh: FreshMasks) -> None:
        # On a small space, where little is left to find, most children are known.
        misses = 0
        made = 0
        while made < count and misses < max(count // 4, TRIES_AN_OFFSPRING):
            move, child = breed(self._rng, self._moves, self._credit, parents)
            if child is None or child in fresh or child in self._move_of:
                misses += 1
                continue
            self._move_of[child] = move
            made += 1

    def _rank(self) -> None:
        """Order by the mean, and forget the worst beyond the size of the pool."""
        masks = list(self._move_of)
        if self._model is None or not masks:
            self._ranked = []
            return
        means = np.round(self._model.mean(masks), _DIGITS)
        order = sorted(range(len(masks)), key=lambda i: (float(means[i]), masks[i].key))
        self._ranked = [masks[i] for i in order[: self._options.candidates]]
        self._move_of = {mask: self._move_of[mask] for mask in self._ranked}


def choose(
    means: Array,
    covariance: Array,
    keys: Sequence[str],
    count: int,
    optimism: float,
    noise: float,
) -> list[int]:
    """The places of a batch with low confidence bounds that tell different things, best first.

    Takes the lowest `mean - optimism * deviation`, conditions the covariance `[n, n]` on it (with
    the variance `noise` of a measurement), and so on; equal bounds go by key.
    """
    rest = covariance.copy()
    left = list(range(len(means)))
    chosen: list[int] = []
    while left and len(chosen) < count:
        bounds = np.round(lower_confidence_bounds(means, np.diag(rest), optimism), _DIGITS)
        best = min(left, key=lambda i: (float(bounds[i]), keys[i]))
        left.remove(best)
        chosen.append(best)
        column = rest[:, best].copy()
        total = float(column[best]) + noise
        if total > 0:
            rest -= np.outer(column, column) / total
    return chosen


def lower_confidence_bounds(means: Array, variances: Array, optimism: float) -> Array:
    """`[n]`: means less so many standard deviations; variances below zero count as zero."""
    return np.asarray(means - optimism * np.sqrt(np.maximum(variances, 0.0)))


def _recorded(
    plan: Generator[Batch, Answers, Start], space: SearchSpace, measured: dict[Mask, Evaluation]
) -> Generator[Batch, Answers, Start]:
    """The plan, its answers on budget written into `measured`."""
    batch = next(plan)
    while True:
        answers: Mapping[Mask, Evaluation] = yield batch
        _record(answers, space, measured)
        try:
            batch = plan.send(answers)
        except StopIteration as ended:
            end: Start = ended.value
            return end


def _record(answers: Answers, space: SearchSpace, measured: dict[Mask, Evaluation]) -> None:
    measured.update({mask: e for mask, e in answers.items() if space.on_budget(mask)})
