"""Optuna over ranking keys: one float a gene, decoded onto the budget.

Bits with repair or penalties serve Optuna's samplers badly; keys that are decoded onto the budget
serve them well (Bean's random keys, where a genetic sampler crosses them). The samplers work on a
study in memory; any of Optuna's storages can hold a copy of it, so its dashboard can show the
search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import Trial, TrialState

from depthsearch.searchers.baselines import cheap_baselines
from depthsearch.searchers.optuna_samplers import (
    OptunaOptions,
    make_sampler,
    quiet,
)
from depthsearch.searchers.optuna_storage import StoredStudy
from depthsearch.searchers.protocol import check_ask, check_tell
from depthsearch.searchers.random import FreshMasks
from depthsearch.searchers.ranking import influence_keys
from depthsearch.searchers.staged import best_masks
from depthsearch.space import Batch, Evaluation, Hints, Mask, Proposal, SearchSpace

_MARGIN = 0.25
_CMAES_MARGIN = 0.1
"""How far from 0.5 the keys of a given mask lie.

CMA-ES starts at such keys with a step of 0.1, in which it must be able to change the mask.
"""
_STALLED_TRIALS = 2
_STALLED_TRIALS_GP = 1
"""Trials that brought no new mask after which one nearby is taken; those of a GP are dear."""
_NEAR_TRIES = 20
_NEAR_STEP = 0.05
_WARM_START_TRIALS = 10
_ONE_GENERATION = 2**31


class OptunaSearcher:
    """A `Searcher` around an Optuna study; raises ConfigError where the study can't be made.

    `stored` is where the trials are copied to; left out, the options' storage, if any.
    """

    def __init__(
        self,
        space: SearchSpace,
        hints: Hints,
        rng: np.random.Generator,
        options: OptunaOptions,
        stored: StoredStudy | None = None,
    ) -> None:
        self._space = space
        self._rng = rng
        self._options = options
        self._seed = int(rng.integers(2**31))
        sampler = make_sampler(options, self._seed)
        if isinstance(sampler, optuna.samplers.BaseGASampler):
            # All baselines are one generation, the best of which are the first parents.
            sampler.population_size = _ONE_GENERATION
        with quiet():
            self._study = optuna.create_study(
                study_name=options.study_name, sampler=sampler, direction="minimize"
            )
        if stored is None and options.storage is not None:
            stored = StoredStudy(options)
        self._stored = stored
        width = len(str(len(space.genes) - 1))
        self._names = [f"key_{g:0{max(width, 2)}d}" for g in range(len(space.genes))]
        self._distributions: dict[str, BaseDistribution] = {
            name: FloatDistribution(0.0, 1.0) for name in self._names
        }
        self._worth = influence_keys(space, hints)
        self._fresh = FreshMasks(space, rng)
        self._known: dict[Mask, Evaluation] = {}
        self._elsewhere: dict[Mask, float] = {}
        self._standing: dict[Mask, float] = {}
        self._pending: dict[Mask, list[Trial]] = {}
        self._waiting: tuple[Proposal, ...] = ()
        self._baselines = cheap_baselines(space, hints)
        self._seeds = list(self._baselines)
        self._seeding = True

    @property
    def name(self) -> str:
        """The method's public name."""
        return "optuna"

    @property
    def study(self) -> optuna.Study:
        """The study in memory, for Optuna's own plots."""
        return self._study

    @property
    def waiting(self) -> tuple[Proposal, ...]:
        """What was asked and not answered yet."""
        return self._waiting

    def ask(self, n: int | None = None) -> Batch:
        """All baselines first, then `batch` masks at a time, or at most `n`."""
        check_ask(n, self._waiting)
        with quiet():
            seeds = self._due_seeds()[:n]
            if seeds:
                self._seeds = [seed for seed in self._seeds if seed not in seeds]
                found = [self._enqueued(seed.mask, seed.origin) for seed in seeds]
            else:
                self._end_seeding()
                found = self._sampled(self._options.batch if n is None else n)
        self._waiting = tuple(found)
        self._store()
        rivals = best_masks(tuple(self._known.values()), self._options.survivors)
        return Batch(self._waiting, self._options.survivors if found else None, rivals)

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Pass each loss to the trials that decoded to its mask; failures become FAIL."""
        check_tell(evaluations, self._waiting)
        with quiet():
            for evaluation in evaluations:
                self._known[evaluation.mask] = evaluation
                for trial in self._pending.pop(evaluation.mask):
                    self._finish(trial, evaluation)
            for trial in (t for trials in self._pending.values() for t in trials):
                self._study.tell(trial, state=TrialState.FAIL)
        self._pending.clear()
        self._waiting = ()
        self._store()

    def learn(self, mask: Mask, keys: Sequence[float], loss: float, complete: bool) -> int | None:
        """Take the loss of a mask that was evaluated elsewhere, so that it isn't asked for here.

        `complete` says whether it saw all text. Returns the number of the trial that tells it, None
        where the mask is known already.
        """
        if mask in self._known or not self._fresh.add(mask):
            return None
        self._elsewhere[mask] = loss
        if complete and any(mask == seed.mask for seed in self._baselines):
            self._standing[mask] = loss
        with quiet():
            trial = self._given(keys)
            self._annotate(trial, mask, "elsewhere")
            self._study.tell(trial, loss)
        return trial.number

    def follow(self, batch: Batch, keys: Mapping[Mask, Sequence[float]]) -> dict[Mask, int]:
        """Take `batch` as what was asked; returns the number of the trial of each mask.

        The trial of a mask that is missing in `keys` gets those of `keys_of`.
        """
        check_ask(None, self._waiting)
        with quiet():
            for proposal in batch.proposals:
                self._enqueued(proposal.mask, proposal.origin, keys.get(proposal.mask))
        followed = {proposal.mask for proposal in batch.proposals}
        self._seeds = [seed for seed in self._seeds if seed.mask not in followed]
        self._waiting = batch.proposals
        return {mask: trials[0].number for mask, trials in self._pending.items()}

    def keys_of(self, mask: Mask) -> tuple[float, ...]:
        """Ranking keys that decode to exactly this mask; influence breaks the ties."""
        order = sorted(range(len(self._worth)), key=lambda g: (self._worth[g], g))
        keys = [0.0] * len(order)
        margin = _CMAES_MARGIN if self._options.sampler == "cmaes" else _MARGIN
        for rank, gene in enumerate(order):
            side = margin if mask.keep[self._space.genes[gene][0]] else -margin
            keys[gene] = 0.5 + side + 0.4 * margin * (rank / len(order) - 0.5)
        return tuple(keys)

    def _due_seeds(self) -> list[Proposal]:
        """The baselines to evaluate: those that nobody has, and one of those that others have.

        The best of them, unless one of our own is as good: a search can only end with a mask that
        is no worse than the best baseline if it has evaluated that one itself.
        """
        due = [seed for seed in self._seeds if seed.mask not in self._elsewhere]
        others = (s for s in self._baselines if s.mask in self._standing.keys() - self._known)
        best = min(others, key=lambda s: (self._standing[s.mask], s.mask.key), default=None)
        known = (self._known.get(seed.mask) for seed in self._baselines)
        ours = min((e.loss for e in known if e and e.loss is not None), default=np.inf)
        if best is not None and self._standing[best.mask] < ours:
            due.insert(0, best)
        return due

    def _enqueued(self, mask: Mask, origin: str, keys: Sequence[float] | None = None) -> Proposal:
        """Run a given mask as a trial of the study."""
        trial = self._given(self.keys_of(mask) if keys is None else keys)
        self._fresh.add(mask)
        return self._start(trial, mask, origin)

    def _given(self, keys: Sequence[float]) -> Trial:
        """A trial with these keys."""
        self._study.enqueue_trial(dict(zip(self._names, keys, strict=True)))
        trial = self._study.ask(self._distributions)
        sampler = self._study.sampler
        if isinstance(sampler, optuna.samplers.BaseGASampler):
            # Optuna counts only trials that it has sampled itself to a generation.
            frozen = self._study.get_trials(deepcopy=False)[trial.number]
            sampler.get_trial_generation(self._study, frozen)
        return trial

    def _sampled(self, count: int) -> list[Proposal]:
        """New masks from the sampler; trials that decode to a known one are answered at once."""
        origin = f"optuna {self._options.sampler}"
        found: list[Proposal] = []
        stalled, patience = 0, _STALLED_TRIALS
        if self._options.sampler == "gp":
            patience = _STALLED_TRIALS_GP
        while len(found) < count and not self._fresh.listed:
            trial = self._study.ask(self._distributions)
            keys = [float(trial.params[name]) for name in self._names]
            mask = self._space.decode(keys)
            if self._fresh.add(mask):
                found.append(self._start(trial, mask, origin))
                continue
            self._repeat(trial, mask)
            stalled += 1
            if stalled % patience == 0:
                near = self._near(keys)
                if near is None:
                    break
                found.append(self._enqueued(near[0], f"{origin} nearby", near[1]))
        for mask in self._fresh.take(count - len(found)):
            found.append(self._enqueued(mask, "optuna random"))
        return found

    def _near(self, keys: Sequence[float]) -> tuple[Mask, tuple[float, ...]] | None:
        """A new mask close to keys whose own mask is known, from steps that grow.

        Without it a sampler that has converged would ask for the same masks for ever.
        """
        for attempt in range(_NEAR_TRIES):
            step = _NEAR_STEP * 1.2**attempt
            moved = np.clip(np.asarray(keys) + self._rng.normal(0.0, step, len(keys)), 0.0, 1.0)
            values = tuple(float(key) for key in moved)
            mask = self._space.decode(values)
            if self._fresh.add(mask):
                return mask, values
        return None

    def _repeat(self, trial: Trial, mask: Mask) -> None:
        """Answer a trial whose mask is known, or will be with the present batch."""
        self._annotate(trial, mask, "duplicate")
        if mask in self._pending:
            self._pending[mask].append(trial)
        elif mask in self._known:
            self._finish(trial, self._known[mask])
        elif mask in self._elsewhere:
            self._study.tell(trial, self._elsewhere[mask])
        else:
            self._study.tell(trial, state=TrialState.FAIL)

    def _start(self, trial: Trial, mask: Mask, origin: str) -> Proposal:
        self._annotate(trial, mask, origin)
        self._pending[mask] = [trial]
        return Proposal(mask, origin)

    def _annotate(self, trial: Trial, mask: Mask, origin: str) -> None:
        trial.set_user_attr("mask", mask.key)
        trial.set_user_attr("cost", self._space.cost(mask))
        trial.set_user_attr("origin", origin)

    def _finish(self, trial: Trial, evaluation: Evaluation) -> None:
        trial.set_user_attr("status", str(evaluation.status))
        if evaluation.loss is None:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, evaluation.loss)

    def _store(self) -> None:
        if self._stored is not None:
            self._stored.sync(self._study)

    def _end_seeding(self) -> None:
        """Start CMA-ES from the baselines, and a genetic sampler with the best of them."""
        sampler = self._study.sampler
        if self._seeding and self._options.sampler == "cmaes":
            done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            # A warm start takes the best tenth, so there must be ten for the best one to be taken.
            copies = -(-_WARM_START_TRIALS // len(done)) if done else 0
            self._study.sampler = make_sampler(self._options, self._seed, done * copies)
        elif self._seeding and isinstance(sampler, optuna.samplers.BaseGASampler):
            sampler.population_size = self._options.population
        self._seeding = False
