"""Optuna over ranking keys: one float a gene, decoded onto the budget.

Bits with repair or penalties serve Optuna's samplers badly; keys that are decoded onto the budget
serve them well. Any Optuna storage can hold the study, so its dashboard can show the search.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from depthsearch.errors import ConfigError
from depthsearch.searchers.baselines import cheap_baselines
from depthsearch.searchers.options import at_least
from depthsearch.searchers.protocol import check_ask, check_tell
from depthsearch.searchers.random import FreshMasks
from depthsearch.searchers.ranking import influence_keys
from depthsearch.searchers.staged import best_masks
from depthsearch.space import Batch, Evaluation, Hints, Mask, Proposal, SearchSpace

_MARGIN = {"tpe": 0.25, "cmaes": 0.1, "random": 0.25}
"""How far from 0.5 the keys of a given mask lie.

CMA-ES starts at such keys with a step of 0.1, in which it must be able to change the mask.
"""
_STALLED_TRIALS = 2
_NEAR_TRIES = 20
_NEAR_STEP = 0.05
_WARM_START_TRIALS = 10


@dataclass(frozen=True)
class OptunaOptions:
    """Which sampler, where the study is kept, and how many masks a batch holds.

    `storage` is an Optuna storage URL, `journal:PATH`, or null for memory. The study must not exist
    yet, or hold no result; `fresh: true` deletes one of the same name first. CMA-ES keeps its
    study in memory: in a storage Optuna would pickle its state.
    """

    sampler: Literal["tpe", "cmaes", "random"] = "tpe"
    storage: str | None = None
    study_name: str = "depthsearch"
    fresh: bool = False
    batch: int = 4
    survivors: int = 4

    def __post_init__(self) -> None:
        at_least(self, batch=1, survivors=1)
        if self.sampler == "cmaes" and self.storage is not None:
            raise ConfigError(
                "the sampler 'cmaes' can't use a storage, where Optuna would pickle its state: "
                "leave 'storage' out, or set 'sampler: tpe'"
            )


class OptunaSearcher:
    """A `Searcher` around an Optuna study; raises ConfigError where the study can't be made."""

    def __init__(
        self, space: SearchSpace, hints: Hints, rng: np.random.Generator, options: OptunaOptions
    ) -> None:
        self._space = space
        self._rng = rng
        self._options = options
        self._seed = int(rng.integers(2**31))
        self._study = _create_study(options, _sampler(options.sampler, self._seed))
        width = len(str(len(space.genes) - 1))
        self._names = [f"key_{g:0{max(width, 2)}d}" for g in range(len(space.genes))]
        self._distributions: dict[str, BaseDistribution] = {
            name: FloatDistribution(0.0, 1.0) for name in self._names
        }
        self._worth = influence_keys(space, hints)
        self._fresh = FreshMasks(space, rng)
        self._known: dict[Mask, Evaluation] = {}
        self._pending: dict[Mask, list[Trial]] = {}
        self._waiting: tuple[Proposal, ...] = ()
        self._seeds = list(cheap_baselines(space, hints))
        self._seeding = True

    @property
    def name(self) -> str:
        """The method's public name."""
        return "optuna"

    @property
    def study(self) -> optuna.Study:
        """The study, for Optuna's own plots and dashboards."""
        return self._study

    def ask(self, n: int | None = None) -> Batch:
        """All baselines first, then `batch` masks at a time, or at most `n`."""
        check_ask(n, self._waiting)
        with _quiet():
            if self._seeds:
                count = len(self._seeds) if n is None else n
                seeds, self._seeds = self._seeds[:count], self._seeds[count:]
                found = [self._enqueued(seed.mask, seed.origin) for seed in seeds]
            else:
                self._end_seeding()
                found = self._sampled(self._options.batch if n is None else n)
        self._waiting = tuple(found)
        rivals = best_masks(tuple(self._known.values()), self._options.survivors)
        return Batch(self._waiting, self._options.survivors if found else None, rivals)

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Pass each loss to the trials that decoded to its mask; failures become FAIL."""
        check_tell(evaluations, self._waiting)
        with _quiet():
            for evaluation in evaluations:
                self._known[evaluation.mask] = evaluation
                for trial in self._pending.pop(evaluation.mask):
                    self._finish(trial, evaluation)
            for trial in (t for trials in self._pending.values() for t in trials):
                self._study.tell(trial, state=TrialState.FAIL)
        self._pending.clear()
        self._waiting = ()

    def keys_of(self, mask: Mask) -> tuple[float, ...]:
        """Ranking keys that decode to exactly this mask; influence breaks the ties."""
        order = sorted(range(len(self._worth)), key=lambda g: (self._worth[g], g))
        keys = [0.0] * len(order)
        margin = _MARGIN[self._options.sampler]
        for rank, gene in enumerate(order):
            side = margin if mask.keep[self._space.genes[gene][0]] else -margin
            keys[gene] = 0.5 + side + 0.4 * margin * (rank / len(order) - 0.5)
        return tuple(keys)

    def _enqueued(self, mask: Mask, origin: str, keys: Sequence[float] | None = None) -> Proposal:
        """Run a given mask as a trial of the study."""
        values = self.keys_of(mask) if keys is None else keys
        self._study.enqueue_trial(dict(zip(self._names, values, strict=True)))
        trial = self._study.ask(self._distributions)
        self._fresh.add(mask)
        return self._start(trial, mask, origin)

    def _sampled(self, count: int) -> list[Proposal]:
        """New masks from the sampler; trials that decode to a known one are answered at once."""
        origin = f"optuna {self._options.sampler}"
        found: list[Proposal] = []
        stalled = 0
        while len(found) < count and not self._fresh.listed:
            trial = self._study.ask(self._distributions)
            keys = [float(trial.params[name]) for name in self._names]
            mask = self._space.decode(keys)
            if self._fresh.add(mask):
                found.append(self._start(trial, mask, origin))
                continue
            self._repeat(trial, mask)
            stalled += 1
            if stalled % _STALLED_TRIALS == 0:
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
        if evaluation.loss is None:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, evaluation.loss)

    def _end_seeding(self) -> None:
        """Start CMA-ES from the baselines, which it does not learn from by itself."""
        if self._seeding and self._options.sampler == "cmaes":
            done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            # A warm start takes the best tenth, so there must be ten for the best one to be taken.
            copies = -(-_WARM_START_TRIALS // len(done)) if done else 0
            self._study.sampler = _sampler("cmaes", self._seed, done * copies)
        self._seeding = False


def _sampler(
    name: str, seed: int, seeds: Sequence[FrozenTrial] = ()
) -> optuna.samplers.BaseSampler:
    with _quiet():
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        _need_cmaes()
        return optuna.samplers.CmaEsSampler(
            seed=seed, warn_independent_sampling=False, source_trials=list(seeds) or None
        )


def check_ready(options: OptunaOptions) -> None:
    """Refuse a sampler whose package is missing and a storage that can't be opened.

    Raises ConfigError, also for a study that is in the way.
    """
    if options.sampler == "cmaes":
        _need_cmaes()
    if options.storage is not None:
        with _explained(options):
            storage = _opened(options.storage)
            if not options.fresh and _has_results(options.study_name, storage):
                raise optuna.exceptions.DuplicatedStudyError


def _need_cmaes() -> None:
    if find_spec("cmaes") is None:
        raise ConfigError(
            "the sampler 'cmaes' needs the package cmaes: pip install depthsearch[cma]"
        )


def _create_study(options: OptunaOptions, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    with _explained(options):
        storage = None if options.storage is None else _opened(options.storage)
        if storage is not None:
            _make_way(options.study_name, storage, options.fresh)
        return optuna.create_study(
            study_name=options.study_name,
            storage=storage,
            sampler=sampler,
            direction="minimize",
        )


def _opened(storage: str) -> optuna.storages.BaseStorage:
    """The storage of a URL; `journal:PATH` is Optuna's journal file."""
    scheme, _, path = storage.partition(":")
    if scheme == "journal":
        return optuna.storages.JournalStorage(JournalFileBackend(path))
    return optuna.storages.get_storage(storage)


@contextmanager
def _explained(options: OptunaOptions) -> Iterator[None]:
    """Bring what storages raise down to one ConfigError."""
    # sqlalchemy is Optuna's own dependency; its errors are what a wrong storage URL raises.
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with _quiet():
            yield
    except optuna.exceptions.DuplicatedStudyError as error:
        raise ConfigError(
            f"the study '{options.study_name}' exists already in this storage: "
            "choose another 'study_name', or set 'fresh: true' to delete it"
        ) from error
    except (
        SQLAlchemyError,
        optuna.exceptions.StorageInternalError,
        ImportError,
        OSError,
        ValueError,
    ) as error:
        # The URL itself may hold a password, so only its scheme is shown.
        scheme = str(options.storage).partition(":")[0]
        raise ConfigError(
            f"the Optuna storage ({scheme}:...) can't be opened ({type(error).__name__}): expected "
            "a URL such as sqlite:///study.db, journal:study.log, or null for memory"
        ) from error


def _make_way(name: str, storage: optuna.storages.BaseStorage, fresh: bool) -> None:
    """Delete a study of this name that nobody needs: any if `fresh`, else one without a result.

    A search killed before its first losses leaves one without a result, and would else be in its
    own way when it is resumed.
    """
    if name in optuna.get_all_study_names(storage) and (fresh or not _has_results(name, storage)):
        optuna.delete_study(study_name=name, storage=storage)


def _has_results(name: str, storage: optuna.storages.BaseStorage) -> bool:
    if name not in optuna.get_all_study_names(storage):
        return False
    study = optuna.load_study(study_name=name, storage=storage)
    return any(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's log lines and its notes on experimental samplers off the terminal."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
