"""Several runs that share one Optuna study, each with its own journal, cost and result.

A run asks for no mask that another one has evaluated: it hands the other's keys and loss to its
sampler instead, which costs nothing and is no part of its journal or of its result. Only the best
baseline of the others is evaluated once more, so that each run's own result is no worse. What runs
evaluate at the same moment may coincide; trials of a run that was killed stay RUNNING until it is
resumed, and nobody waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial

from depthsearch.errors import InputError
from depthsearch.searchers.optuna_keys import OptunaSearcher
from depthsearch.searchers.optuna_samplers import OptunaOptions
from depthsearch.searchers.optuna_storage import Search, StoredStudy, identity
from depthsearch.searchers.protocol import check_ask
from depthsearch.space import Batch, Evaluation, Hints, Mask, SearchSpace, Status


class SharedOptunaSearcher:
    """A `SharedSearcher` around an Optuna study that other runs write to as well."""

    def __init__(
        self, space: SearchSpace, hints: Hints, rng: np.random.Generator, options: OptunaOptions
    ) -> None:
        self._space = space
        self._hints = hints
        self._rng = rng
        self._options = options
        self._joined: tuple[OptunaSearcher, StoredStudy] | None = None
        self._made: dict[str, FrozenTrial] = {}
        self._following = False

    @property
    def name(self) -> str:
        """The method's public name."""
        return "optuna"

    def join(self, member: str, search: Search) -> None:
        """Create or join the study as the run `member`, a hexadecimal number that no other has.

        Raises ConfigError where the study belongs to another search, StorageError.
        """
        stored = StoredStudy(self._options, identity(self._space, search), member)
        # Runs with the same seed judge on the same text, but must not ask for the same masks.
        rng = np.random.default_rng([int(self._rng.integers(2**31)), int(member, 16)])
        searcher = OptunaSearcher(self._space, self._hints, rng, self._options, stored)
        self._joined = searcher, stored
        self._made = stored.own()
        self._following = True

    def ask(self, n: int | None = None) -> Batch:
        """As `OptunaSearcher.ask`, with what the other runs have told by now."""
        searcher, stored = self._study()
        check_ask(n, searcher.waiting)
        if self._following:
            self._following = False
            stored.release()
        for trial in stored.news():
            keys = [float(trial.params[name]) for name in sorted(trial.params)]
            if trial.value is not None:
                complete = trial.user_attrs.get("status") == Status.OK
                mask = Mask.from_key(trial.user_attrs["mask"])
                number = searcher.learn(mask, keys, trial.value, complete)
                if number is not None:
                    stored.adopt(number, trial)
        return searcher.ask(n)

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """As `OptunaSearcher.tell`."""
        self._study()[0].tell(evaluations)

    def follow(self, batch: Batch) -> None:
        """Take an ask of the journal again, with the trials that the killed process made for it."""
        searcher, stored = self._study()
        made = {proposal.mask: self._made.get(proposal.mask.key) for proposal in batch.proposals}
        keys = {
            mask: [float(trial.params[name]) for name in sorted(trial.params)]
            for mask, trial in made.items()
            if trial is not None
        }
        for mask, number in searcher.follow(batch, keys).items():
            trial = made[mask]
            if trial is not None:
                stored.adopt(number, trial)
        stored.sync(searcher.study)

    def leave(self) -> None:
        """End this run's trials that were asked and never answered; raises StorageError."""
        self._study()[1].release()

    def _study(self) -> tuple[OptunaSearcher, StoredStudy]:
        if self._joined is None:
            raise InputError("a shared searcher is asked before it has joined: call join first")
        return self._joined
