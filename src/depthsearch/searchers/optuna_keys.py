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
from optuna.trial import Trial, TrialState

from depthsearch.searchers.baselines import (
    cheap_baselines,
    influence_baselines,
    window_baselines,
)
from depthsearch.searchers.front import promising
from depthsearch.searchers.optuna_coding import Coding, Coordinates
from depthsearch.searchers.optuna_samplers import (
    OptunaOptions,
    check_front,
    make_sampler,
    quiet,
)
from depthsearch.searchers.optuna_storage import StoredStudy
from depthsearch.searchers.protocol import check_ask, check_tell
from depthsearch.searchers.random import FreshAtAny
from depthsearch.searchers.ranking import influence_keys
from depthsearch.searchers.staged import best_masks
from depthsearch.space import Batch, Evaluation, Hints, Mask, Proposal, SearchSpace, Status

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
_WINDOWS = 0.25
"""Share of the windows at each further budget of a front that are tried, as in `front`."""


class OptunaSearcher:
    """A `Searcher` around an Optuna study; raises ConfigError where the study can't be made.

    `stored` is where the trials are copied to; left out, the options' storage, if any, as the study
    of `run`, which may be `resumed`.
    """

    def __init__(
        self,
        space: SearchSpace,
        hints: Hints,
        rng: np.random.Generator,
        options: OptunaOptions,
        stored: StoredStudy | None = None,
        run: str = "",
        resumed: bool = False,
    ) -> None:
        check_front(options, space)
        self._space = space
        self._hints = hints
        self._rng = rng
        self._options = options
        self._seed = int(rng.integers(2**31))
        sampler = make_sampler(options, self._seed)
        if isinstance(sampler, optuna.samplers.BaseGASampler):
            # All baselines are one generation, the best of which are the first parents.
            sampler.population_size = _ONE_GENERATION
        with quiet():
            margin = _CMAES_MARGIN if options.sampler == "cmaes" else _MARGIN
            self._coding = Coding(space, influence_keys(space, hints), margin)
            objectives = self._coding.objectives
            self._study = optuna.create_study(
                study_name=options.study_name,
                sampler=sampler,
                directions=["minimize"] * len(objectives),
            )
            if space.front:
                self._study.set_metric_names(list(objectives))
        if stored is None and options.storage is not None:
            stored = StoredStudy(options, run=run, objectives=objectives, resumed=resumed)
        self._stored = stored
        self._fresh = FreshAtAny(space, rng)
        self._known: dict[Mask, Evaluation] = {}
        self._best: dict[int, Evaluation] = {}
        self._elsewhere: dict[Mask, float] = {}
        self._standing: dict[Mask, float] = {}
        self._pending: dict[Mask, list[Trial]] = {}
        self._waiting: tuple[Proposal, ...] = ()
        self._baselines = cheap_baselines(space, hints) if options.baselines else ()
        self._seeds = list(self._baselines)
        own = next(i for i, p in enumerate(space.points) if p.budget == space.budget)
        self._at = space.points[own]
        places = sorted(range(len(space.points)), key=lambda i: (abs(i - own), i))
        self._further = [space.points[i] for i in places[1:]]
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
        """All baselines first, if any, then `batch` masks at a time, but at most `n`.

        With a front only baselines race, each against masks of its budget: the study weighs all
        others in loss and costs.
        """
        check_ask(n, self._waiting)
        with quiet():
            seeds = self._due_seeds()[:n]
            while not seeds and self._further and self._options.baselines:
                self._at = self._further.pop(0)
                self._seeds = self._baselines_at(self._at)
                seeds = self._seeds[:n]
            if seeds:
                self._seeds = [seed for seed in self._seeds if seed not in seeds]
                found = [self._enqueued(seed.mask, seed.origin) for seed in seeds]
            else:
                self._end_seeding()
                batch = self._options.batch
                found = self._sampled(batch if n is None else min(batch, n))
        self._waiting = tuple(found)
        self._store()
        if not found or (self._space.front and not seeds):
            return Batch(self._waiting)
        rivals = tuple(self._known.values())
        if self._space.front:
            rivals = tuple(e for e in rivals if self._at.on_budget(e.mask))
        count = self._options.survivors
        return Batch(self._waiting, count, best_masks(rivals, count))

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Pass each loss to the trials that decoded to its mask; failures become FAIL.

        A mask that lost its race passes as no better than the best one known at its budget.
        """
        check_tell(evaluations, self._waiting)
        self._known |= {evaluation.mask: evaluation for evaluation in evaluations}
        for place, point in enumerate(self._space.points):
            found = [e for e in evaluations if e.status is Status.OK and point.on_budget(e.mask)]
            for evaluation in found:
                best = self._best.setdefault(place, evaluation)
                self._best[place] = min(best, evaluation, key=lambda e: e.order)
        with quiet():
            for evaluation in evaluations:
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
            trial = self._given(Coordinates(tuple(keys)))
            self._annotate(trial, mask, "elsewhere")
            self._tell(trial, mask, loss)
        return trial.number

    def follow(self, batch: Batch, keys: Mapping[Mask, Sequence[float]]) -> dict[Mask, int]:
        """Take `batch` as what was asked; returns the number of the trial of each mask.

        The trial of a mask that is missing in `keys` gets those of `keys_of`.
        """
        check_ask(None, self._waiting)
        with quiet():
            for proposal in batch.proposals:
                found = keys.get(proposal.mask)
                given = None if found is None else Coordinates(tuple(found))
                self._enqueued(proposal.mask, proposal.origin, given)
        followed = {proposal.mask for proposal in batch.proposals}
        self._seeds = [seed for seed in self._seeds if seed.mask not in followed]
        self._waiting = batch.proposals
        return {mask: trials[0].number for mask, trials in self._pending.items()}

    def keys_of(self, mask: Mask) -> tuple[float, ...]:
        """Ranking keys that decode to exactly this mask; influence breaks the ties."""
        return self._coding.encode(mask).keys

    def _due_seeds(self) -> list[Proposal]:
        """The baselines to evaluate: those that nobody has, and one of those that others have.

        The best of them, unless one of our own is as good: a search can only end with a mask that
        is no worse than the best baseline if it has evaluated that one itself.
        """
        due = [seed for seed in self._seeds if seed.mask not in self._elsewhere]
        others = (s for s in self._baselines if s.mask in self._standing.keys() - self._known)
        best = min(others, key=lambda s: (self._standing[s.mask], s.mask.key), default=None)
        known = (self._known.get(seed.mask) for seed in self._baselines)
        complete = (e for e in known if e is not None and e.status is Status.OK)
        ours = min((e.estimate(None) for e in complete), default=np.inf)
        if best is not None and self._standing[best.mask] < ours:
            due.insert(0, best)
        return due

    def _baselines_at(self, point: SearchSpace) -> list[Proposal]:
        """New baselines at a further budget: rankings, and windows near the good ones so far."""
        windows = window_baselines(point, self._hints)
        known = {e.mask: e for e in self._known.values() if len(self._space.gaps(e.mask)) == 1}
        near = promising(windows, known)[: max(1, round(_WINDOWS * len(windows)))]
        seeds = {p.mask: p for p in (*windows[:1], *influence_baselines(point, self._hints), *near)}
        return [seed for mask, seed in seeds.items() if mask not in self._fresh]

    def _enqueued(self, mask: Mask, origin: str, given: Coordinates | None = None) -> Proposal:
        """Run a given mask as a trial of the study."""
        trial = self._given(given or self._coding.encode(mask))
        self._fresh.add(mask)
        return self._start(trial, mask, origin)

    def _given(self, found: Coordinates) -> Trial:
        """A trial that lies there."""
        self._study.enqueue_trial(self._coding.params(found))
        trial = self._study.ask(self._coding.distributions)
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
            trial = self._study.ask(self._coding.distributions)
            drawn = self._coding.read(trial.params)
            mask = self._coding.decode(drawn)
            if self._fresh.add(mask):
                found.append(self._start(trial, mask, origin))
                continue
            self._repeat(trial, mask)
            stalled += 1
            if stalled % patience == 0:
                near = self._near(drawn)
                if near is None:
                    break
                found.append(self._enqueued(near[0], f"{origin} nearby", near[1]))
        for mask in self._fresh.take(count - len(found)):
            found.append(self._enqueued(mask, "optuna random"))
        return found

    def _near(self, known: Coordinates) -> tuple[Mask, Coordinates] | None:
        """A new mask at the same budget close to keys whose mask is known, from steps that grow.

        Without it a sampler that has converged would ask for the same masks for ever.
        """
        for attempt in range(_NEAR_TRIES):
            step = _NEAR_STEP * 1.2**attempt
            steps = self._rng.normal(0.0, step, len(known.keys))
            moved = np.clip(np.asarray(known.keys) + steps, 0.0, 1.0)
            found = Coordinates(tuple(float(key) for key in moved), known.place)
            mask = self._coding.decode(found)
            if self._fresh.add(mask):
                return mask, found
        return None

    def _repeat(self, trial: Trial, mask: Mask) -> None:
        """Answer a trial whose mask is known, or will be with the present batch."""
        self._annotate(trial, mask, "duplicate")
        if mask in self._pending:
            self._pending[mask].append(trial)
        elif mask in self._known:
            self._finish(trial, self._known[mask])
        elif mask in self._elsewhere:
            self._tell(trial, mask, self._elsewhere[mask])
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
            best = self._best.get(self._coding.read(trial.params).place)
            loss = evaluation.estimate(best)
            if best is not None and best.loss is not None:
                loss = max(loss, best.loss)
            self._tell(trial, evaluation.mask, loss)

    def _tell(self, trial: Trial, mask: Mask, loss: float) -> None:
        self._study.tell(trial, self._coding.values(mask, loss))

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
