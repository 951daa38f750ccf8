"""A study in one of Optuna's storages, kept equal to the one in memory that is sampled from.

Sampling happens in memory; a storage only holds what was asked and told, each trial written whole
in one transaction. So a killed process leaves no trial half-made, no sampler keeps state in a
storage, and what others do to the study can't change the asks of a search that is not shared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from depthsearch.errors import CONTINUED, ConfigError, StorageError
from depthsearch.searchers.optuna_samplers import OptunaOptions, need_package, quiet
from depthsearch.space import SearchSpace

Search = Mapping[str, Any]
"""What the searches that share a study must have in common, by name, as plain data for JSON."""

_SEARCH = "depthsearch"
"""The study's attribute that holds the `Search`, on shared studies only."""
_RUN = "run"
"""The attribute of a study, or of a shared study's trials, that tells which run made them."""
_LOCKED_SECONDS = 60
_OPENING_TRIES = 5


class StoredStudy:
    """A study in a storage; raises ConfigError where it can't be had, StorageError later on.

    `run` names the run that writes it, `objectives` what the study minimizes. A run that is
    `resumed` makes its own study anew, unless that is shared.
    """

    def __init__(
        self,
        options: OptunaOptions,
        search: Search | None = None,
        run: str = "",
        objectives: Sequence[str] = ("loss",),
        resumed: bool = False,
    ) -> None:
        self._options = options
        self._search = search
        self._run = run
        with _opening(options):
            self._storage = _opened(options)
            if self._search is None:
                _make_way(options, self._storage, run if resumed else None)
            study = optuna.create_study(
                study_name=options.study_name,
                storage=self._storage,
                directions=["minimize"] * len(objectives),
                load_if_exists=self._search is not None,
            )
            if len(objectives) > 1:
                study.set_metric_names(list(objectives))
            self._study = self._storage.get_study_id_from_name(study.study_name)
            if self._search is None and run:
                self._storage.set_study_user_attr(self._study, _RUN, run)
        self._ids: dict[int, int] = {}
        self._open: set[int] = set()
        self._seen: set[int] = set()
        if self._search is not None:
            with _working(options):
                self._claim(self._search)

    def sync(self, study: optuna.Study) -> None:
        """Bring new and newly finished trials of `study` into the storage."""
        with _working(self._options):
            for trial in study.get_trials(deepcopy=False):
                if trial.number not in self._ids:
                    self._create(trial)
                elif trial.number in self._open and trial.state.is_finished():
                    self._finish(trial)

    def adopt(self, number: int, stored: FrozenTrial) -> None:
        """Let a stored trial stand for trial `number` of the study in memory."""
        with _working(self._options):
            self._ids[number] = self._storage.get_trial_id_from_study_id_trial_number(
                self._study, stored.number
            )
        self._seen.add(stored.number)
        if not stored.state.is_finished():
            self._open.add(number)

    def own(self) -> dict[str, FrozenTrial]:
        """The trials in which this run asked for masks, by mask.

        Of several for one mask the last: the others were given up before they were in the journal.
        """
        return {
            trial.user_attrs["mask"]: trial
            for trial in self._trials()
            if trial.user_attrs.get(_RUN) == self._run
            and trial.user_attrs.get("origin") != "duplicate"
        }

    def news(self) -> list[FrozenTrial]:
        """Complete trials that this process has neither made nor returned before."""
        with _working(self._options):
            self._check(self._storage.get_study_user_attrs(self._study).get(_SEARCH))
        found = [
            trial
            for trial in self._trials()
            if trial.state is TrialState.COMPLETE
            and "mask" in trial.user_attrs
            and trial.number not in self._seen
        ]
        self._seen.update(trial.number for trial in found)
        return found

    def release(self) -> None:
        """End the trials of this run that nobody is going to answer any more."""
        kept = {self._ids[number] for number in self._open}
        with _working(self._options):
            for trial in self._trials():
                if trial.state.is_finished() or trial.user_attrs.get(_RUN) != self._run:
                    continue
                place = self._storage.get_trial_id_from_study_id_trial_number(
                    self._study, trial.number
                )
                if place not in kept:
                    self._end(place, TrialState.FAIL, None)

    def _trials(self) -> list[FrozenTrial]:
        with _working(self._options):
            return self._storage.get_all_trials(self._study, deepcopy=False)

    def _create(self, trial: FrozenTrial) -> None:
        own = {} if self._search is None else {_RUN: self._run}
        template = create_trial(
            state=trial.state,
            values=trial.values,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=trial.user_attrs | own,
        )
        place = self._storage.create_new_trial(self._study, template)
        self._ids[trial.number] = place
        self._seen.add(self._storage.get_trial_number_from_id(place))
        if not trial.state.is_finished():
            self._open.add(trial.number)

    def _finish(self, trial: FrozenTrial) -> None:
        place = self._ids[trial.number]
        if "status" in trial.user_attrs:
            with suppress(optuna.exceptions.UpdateFinishedTrialError):
                self._storage.set_trial_user_attr(place, "status", trial.user_attrs["status"])
        self._end(place, trial.state, trial.values)
        self._open.discard(trial.number)

    def _end(self, place: int, state: TrialState, values: list[float] | None) -> None:
        # Somebody may have ended the trial by hand, in the dashboard; it stays as they left it.
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_state_values(place, state, values)

    def _claim(self, search: Search) -> None:
        """Write what is searched into a new study, or compare it with what is there."""
        found = self._storage.get_study_user_attrs(self._study).get(_SEARCH)
        if found is None and not self._storage.get_all_trials(self._study, deepcopy=False):
            self._storage.set_study_user_attr(self._study, _SEARCH, search)
            found = self._storage.get_study_user_attrs(self._study).get(_SEARCH)
        self._check(found)

    def _check(self, found: Search | None) -> None:
        if self._search is not None:
            _check_same(self._options.study_name, found, self._search)


def identity(space: SearchSpace, search: Search) -> dict[str, Any]:
    """`search` with the space, which masks, keys and costs belong to."""
    text = json.dumps(space.to_json(), sort_keys=True)
    return {"space": hashlib.sha256(text.encode()).hexdigest()[:16], **_plain(search)}


def check_ready(options: OptunaOptions, search: Search | None = None) -> None:
    """Refuse a sampler whose package is missing and a storage that can't be opened.

    Raises ConfigError, also for a study that is in the way, or where it is shared, for one of
    another search than `search`, an `identity`.
    """
    need_package(options.sampler)
    if options.storage is None:
        return
    with _opening(options):
        storage = _opened(options)
        if not options.shared:
            _in_the_way(options, storage)
            return
        study = _study_id(options.study_name, storage)
        if study is None or search is None:
            return
        found = storage.get_study_user_attrs(study).get(_SEARCH)
        empty = not storage.get_all_trials(study, deepcopy=False)
    if found is not None or not empty:
        _check_same(options.study_name, found, search)


def _check_same(name: str, found: Search | None, search: Search) -> None:
    if found is None:
        raise ConfigError(
            f"the study '{name}' was not made by a search with 'shared: true', so it can't be "
            "joined: choose another 'study_name'"
        )
    differs = [key for key in {**search, **found} if search.get(key) != found.get(key)]
    if differs:
        raise ConfigError(
            f"the study '{name}' is shared by another search, which differs in: "
            f"{', '.join(differs)}; losses are only comparable with all of these the same, so set "
            "them alike, or choose another 'study_name'"
        )


def _opened(options: OptunaOptions) -> BaseStorage:
    """The storage of the options' URL; `journal:PATH` is Optuna's journal file."""
    url = str(options.storage)
    scheme, _, path = url.partition(":")
    if scheme == "journal":
        return optuna.storages.JournalStorage(JournalFileBackend(path))
    # sqlalchemy is Optuna's own dependency.
    from sqlalchemy.exc import SQLAlchemyError

    # By default SQLite gives up after five seconds of waiting for another process, and a server
    # may have closed a connection that was idle while masks were evaluated.
    settings: dict[str, Any] = {"pool_pre_ping": True}
    if scheme.startswith("sqlite"):
        settings = {"connect_args": {"timeout": _LOCKED_SECONDS}}
    tries = 0
    while True:
        tries += 1
        try:
            return optuna.storages.get_storage(RDBStorage(url, dict(settings)))
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if tries == _OPENING_TRIES or not _made_meanwhile(error):
                raise


def _made_meanwhile(error: Exception) -> bool:
    """Whether making the tables failed since another process made them at the same time."""
    text = f"{error} {error.__cause__}".lower()
    return "already exists" in text or "unique" in text


@contextmanager
def _opening(options: OptunaOptions) -> Iterator[None]:
    """Bring what a wrong storage raises down to one ConfigError."""
    from sqlalchemy.exc import SQLAlchemyError

    # The URL itself may hold a password, so only its scheme is shown.
    scheme = str(options.storage).partition(":")[0]
    try:
        with quiet():
            yield
    except optuna.exceptions.DuplicatedStudyError as error:
        raise ConfigError(
            f"the study '{options.study_name}' exists already in this storage: choose another "
            "'study_name', or set 'fresh: true' to delete it"
        ) from error
    except ImportError as error:
        driver = ": pip install depthsearch[postgresql]" if scheme.startswith("postgresql") else ""
        raise ConfigError(
            f"the Optuna storage ({scheme}:...) needs a database driver that is not installed"
            f"{driver}"
        ) from error
    except (
        SQLAlchemyError,
        optuna.exceptions.StorageInternalError,
        OSError,
        ValueError,
    ) as error:
        raise ConfigError(
            f"the Optuna storage ({scheme}:...) can't be opened ({type(error).__name__}): expected "
            "a URL such as sqlite:///study.db, postgresql+psycopg://user@host/database, "
            "journal:study.log, or null for memory"
        ) from error


@contextmanager
def _working(options: OptunaOptions) -> Iterator[None]:
    """Bring what a storage raises in the middle of a search down to one StorageError."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with quiet():
            yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError, KeyError) as error:
        gone = isinstance(error, KeyError)
        scheme = str(options.storage).partition(":")[0]
        raise StorageError(
            f"the Optuna storage ({scheme}:...) failed "
            f"({'the study was deleted' if gone else type(error).__name__}): the journal is "
            f"complete, so put the storage right; {CONTINUED}"
        ) from error


def _make_way(options: OptunaOptions, storage: BaseStorage, resumed: str | None) -> None:
    """Delete a study of this name that nobody needs: any if `fresh`, else one without a result.

    A search killed before its first losses leaves one without a result, and would else be in its
    own way when it is resumed. Where the run `resumed` goes on after these, only its own.
    """
    found = _in_the_way(options, storage) if resumed is None else _left(options, storage, resumed)
    if found is not None:
        storage.delete_study(found)


def _left(options: OptunaOptions, storage: BaseStorage, run: str) -> int | None:
    """The study of this name, if any, that `run` left; raises ConfigError for one of another."""
    study = _study_id(options.study_name, storage)
    if study is None:
        return None
    attributes = storage.get_study_user_attrs(study)
    # A process killed in between leaves one that holds nothing, not even a name.
    empty = not attributes and not storage.get_all_trials(study, deepcopy=False)
    if attributes.get(_RUN) != run and not empty:
        raise ConfigError(
            f"the study '{options.study_name}' in this storage is not this run's any more: give "
            "another 'storage' in the config.yaml of this run, or delete the study, then resume"
        )
    return study


def _in_the_way(options: OptunaOptions, storage: BaseStorage) -> int | None:
    """The study of this name, if any, which may be deleted; raises what says why it may not be.

    DuplicatedStudyError where it has results and `fresh` is not set, ConfigError for a shared one.
    """
    study = _study_id(options.study_name, storage)
    if study is None:
        return None
    if _SEARCH in storage.get_study_user_attrs(study):
        raise ConfigError(
            f"the study '{options.study_name}' is shared by other runs: choose another "
            "'study_name', or set 'shared: true' to join it"
        )
    trials = storage.get_all_trials(study, deepcopy=False)
    if not options.fresh and any(trial.state.is_finished() for trial in trials):
        raise optuna.exceptions.DuplicatedStudyError
    return study


def _study_id(name: str, storage: BaseStorage) -> int | None:
    try:
        return storage.get_study_id_from_name(name)
    except KeyError:
        return None


def _plain(search: Search) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(search))
    return plain
