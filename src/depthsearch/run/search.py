"""Run a search in a run directory, or resume one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthsearch import __version__
from depthsearch.calibration.windows import Splits
from depthsearch.config import RunConfig, SearchConfig, load_config, resolved_yaml
from depthsearch.errors import ConfigError, RunDirectoryError, StorageError
from depthsearch.evaluation import Backend
from depthsearch.journal import Journal, read_journal
from depthsearch.model.patches import file_digest, save_patches
from depthsearch.run.directory import (
    BEST,
    CONFIG,
    FRONT,
    JOURNAL,
    REPAIR,
    WORKERS,
    check_run_directory,
    create_directory,
    occupied,
    read_json,
    write_json,
)
from depthsearch.run.fits import text_name
from depthsearch.run.front import front_grid, front_json
from depthsearch.run.ledger import Ledger, difference
from depthsearch.run.loop import OnProgress, Outcome, Progress, SearchLoop
from depthsearch.run.planning import check_cost
from depthsearch.run.session import Session, opened
from depthsearch.run.sharing import search_identity
from depthsearch.run.tasks import check_two_stacks
from depthsearch.run.tracking import Tracker, open_tracker, tracked
from depthsearch.searchers import check_space, check_storage, needs_limit
from depthsearch.space import Mask

if TYPE_CHECKING:
    from depthsearch.evaluation.ray_metrics import Metrics

Finish = Callable[[Path], object]


def search(
    config: RunConfig,
    out: Path,
    *,
    session: Session | None = None,
    on_progress: OnProgress | None = None,
    finish: Finish | None = None,
    tracker: Tracker | None = None,
) -> Outcome:
    """Search as configured in the new run directory `out`.

    `finish(out)` runs after the journal is complete and before best.json, which is written last, so
    its existence means that the run is whole. `tracker` gets the figures of each step instead of
    the configured one. Raises InputError before anything is created where
    something asked for is wrong, RunDirectoryError where `out` exists.
    """
    if occupied(out):
        create_directory(out, {})
    check_limit(config.search)
    tracker = tracker or open_tracker(config.tracking, out)
    with opened(config, session) as session:
        check_run(session)
        create_directory(out, {CONFIG: resolved_yaml(config), JOURNAL: ""})
        return _continue(session, out, on_progress, finish, tracker)


def check_limit(search: SearchConfig, arm: str | None = None) -> None:
    """Refuse a search, or that of an arm, which nothing would end; raises ConfigError."""
    limits = (search.cost_tokens, search.max_evaluations, search.patience)
    if limits != (None, None, None) or not needs_limit(search.method):
        return
    who = f"the method '{search.method}'" if arm is None else f"the arm '{arm}' ({search.method})"
    cost = "search.cost_tokens" if arm is None else "compare.cost_tokens to a number"
    raise ConfigError(
        f"{who} goes on until a limit ends it, and there is none: set {cost}, "
        "search.max_evaluations or search.patience, such as --set search.patience=150"
    )


def check_run(session: Session) -> None:
    """Refuse what would only fail later, before anything is created; raises InputError."""
    search = session.config.search
    if session.anatomy.encoder_blocks:
        # Opening a session asked this of the search alone, not of the arms of a comparison.
        check_two_stacks(session.config)
    check_space(search.method, search.options, session.space)
    splits = session.splits(search.seed)
    select, finals = session.backends(splits, search.seed)
    check_cost(session.plan(), session.space, select, finals)
    signature = session.signature(splits, search.seed)
    identity = search_identity(_start(session, signature))
    check_storage(search.method, search.options, session.space, identity)


def check_unchanged(session: Session, out: Path) -> None:
    """Refuse a run of another model, text or library than the session's; raises RunDirectoryError.

    Compared is what a resume compares but for the configuration, which is the caller's to know.
    """
    records = read_journal(out / JOURNAL)
    if not records:
        return
    seed = session.config.search.seed
    now = _start(session, session.signature(session.splits(seed), seed))
    del now["config"]
    before = {key: records[0].get(key) for key in now}
    now = json.loads(json.dumps(now))
    if before != now:
        raise RunDirectoryError(
            f"{out} was searched on something else (it differs in {difference(before, now)}), so "
            "nothing can be compared with it: restore the model, the text and the libraries, or "
            "choose another --out"
        )


def resume(
    out: Path,
    *,
    session: Session | None = None,
    on_progress: OnProgress | None = None,
    finish: Finish | None = None,
    tracker: Tracker | None = None,
) -> Outcome:
    """Continue a killed or interrupted search; a finished one is checked and left as it is.

    Raises RunDirectoryError where `out` is no run directory, JournalError where the repetition
    diverges from the journal.
    """
    config = run_config(out)
    tracker = tracker or open_tracker(config.tracking, out)
    with opened(config, session) as session:
        return _continue(session, out, on_progress, finish, tracker)


def run_config(out: Path) -> RunConfig:
    """The configuration of a run directory; raises RunDirectoryError."""
    check_run_directory(out)
    return load_config(out / CONFIG)


def _continue(
    session: Session,
    out: Path,
    on_progress: OnProgress | None,
    finish: Finish | None,
    tracker: Tracker | None,
) -> Outcome:
    seed = session.config.search.seed
    splits = session.splits(seed)
    signature = session.signature(splits, seed)
    with Journal(out / JOURNAL) as journal, tracked(tracker, out) as on_record:
        select, finals = session.backends(splits, seed)
        metrics = session.metrics(out.absolute().name)
        session.tell_workers_to(partial(_tell_state, out / WORKERS, metrics))
        loop = SearchLoop(
            Ledger(journal, on_record),
            session.space,
            session.plan(),
            select,
            finals,
            partial(_tell_progress, on_progress, metrics),
        )
        outcome = loop.run(_start(session, signature))
        if finish is not None:
            finish(out)
        best = best_json(session, outcome, seed, signature)
        if _whole(out, best, bool(outcome.front)):
            return outcome
        repair = _repair(session, out / REPAIR, outcome.best, splits, finals)
        best |= {"repair": repair}
        if outcome.front:
            write_json(out / FRONT, _front(session, out, outcome, best, splits, finals))
        write_json(out / BEST, best)
    return outcome


def best_json(
    session: Session, outcome: Outcome, seed: int, signature: dict[str, Any]
) -> dict[str, Any]:
    """The result of a run, with the mask by site name and everything to reproduce it."""
    space, mask = session.space, outcome.best
    baseline = outcome.baseline
    return {
        "version": __version__,
        "mask": mask.key,
        "dropped": [space.sites[i].name for i in mask.dropped],
        "kept": [space.sites[i].name for i in mask.kept],
        "origin": outcome.origin,
        "loss": outcome.search.loss,
        "stderr": outcome.search.stderr,
        "finals_loss": outcome.finals.loss,
        "finals_stderr": outcome.finals.stderr,
        "baseline": None if baseline is None else baseline.key,
        "metric": space.budget.metric,
        "cost": space.cost(mask),
        "cap": space.cap,
        "dense_cost": space.cost(space.dense),
        "budget": space.budget.to_json(),
        "budget_text": space.budget.text,
        "cost_tokens": outcome.cost_tokens,
        "evaluations": outcome.evaluations,
        "reason": outcome.reason,
        "seed": seed,
        "signature": signature,
        "model": session.model_json,
    }


def _whole(out: Path, best: Mapping[str, Any], front: bool) -> bool:
    """Whether `out` holds this result already, with the weights that it was repaired with."""
    with suppress(RunDirectoryError, StorageError, OSError, KeyError):
        there = read_json(out / BEST, "")
        repairs = [there.pop("repair")]
        # By way of JSON, which knows no tuples.
        if there != json.loads(json.dumps(best)):
            return False
        if front:
            points = read_json(out / FRONT, "")["points"]
            repairs += [point.get("repair") for point in points]
        kept = [repair for repair in repairs if repair is not None]
        return all(file_digest(out / r.get("file", REPAIR)) == r["sha256"] for r in kept)
    return False


def _front(
    session: Session,
    out: Path,
    outcome: Outcome,
    best: Mapping[str, Any],
    splits: Splits,
    finals: Backend,
) -> dict[str, Any]:
    """What front.json holds; where masks are repaired, each one's weights go beside it."""
    repairs: dict[str, dict[str, Any]] = {}
    if best["repair"] is not None:
        repairs[outcome.best.key] = best["repair"] | {"file": REPAIR}
        for number, point in enumerate(session.space.points, start=1):
            for answer in outcome.front:
                if answer.space.budget == point.budget and answer.best.key not in repairs:
                    name = f"repair-{number}.safetensors"
                    found = _repair(session, out / name, answer.best, splits, finals)
                    repairs[answer.best.key] = {**(found or {}), "file": name}
    keys = ("cost_tokens", "evaluations", "reason", "seed", "signature", "model")
    about = {key: best[key] for key in keys}
    front = session.config.front
    left_out = None if front is None else front_grid(session.space, front).left_out
    return front_json(session.space, outcome, repairs, about, left_out)


def _repair(
    session: Session, path: Path, mask: Mask, splits: Splits, finals: Backend
) -> dict[str, Any] | None:
    """Write the refitted weights of a result, and describe them; None without a repair."""
    search, calibration = session.config.search, session.config.calibration
    if search.finished == "none":
        return None
    patches = session.repair(mask, splits, search.seed, finals)
    return {
        "kind": search.finished,
        "fit_tokens": calibration.finals_fit_tokens
        // calibration.window_tokens
        * calibration.window_tokens,
        "sites": {
            session.anatomy.sites[patch.site].name: {"ridge": patch.ridge, "left": patch.left}
            for patch in patches
        },
        "sha256": save_patches(path, patches, session.anatomy, mask),
    }


def _tell_state(path: Path, metrics: Metrics | None, state: dict[str, Any]) -> None:
    """Write what watchers read; no search ends because it can't be written."""
    with suppress(StorageError):
        write_json(path, state)
    if metrics is not None:
        metrics.tell_state(state)


def _tell_progress(
    on_progress: OnProgress | None, metrics: Metrics | None, progress: Progress
) -> None:
    if metrics is not None:
        metrics.tell_progress(progress.evaluations, progress.cost_tokens, progress.best_loss)
    if on_progress is not None:
        on_progress(progress)


def _start(session: Session, signature: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": __version__,
        "signature": signature,
        "config": shareable_config(session),
        "space": session.space.to_json(),
    }


def shareable_config(session: Session) -> dict[str, Any]:
    """The configuration without the folders of this machine and without what may be secret.

    Paths, workers and trackers differ between machines and may change before a resume without
    making another search; the fingerprints tell.
    """
    config = session.config.to_json()
    del config["cluster"], config["tracking"]
    del config["model"]["streamed"], config["model"]["host_gb"]
    config["model"]["path"] = session.model_json["source"]
    config["calibration"]["text"] = session.documents_name
    if session.fit_other is not None:
        config["calibration"]["fit_text"] = text_name(session.fit_other.documents)
    if session.latency is not None:
        config["space"]["latency"] = session.latency.name
    arms = (config["compare"] or {}).get("arms", {})
    for search in (config["search"], *arms.values()):
        if search["options"].get("storage") is not None:
            # Its URL may hold a password.
            search["options"]["storage"] = "(not recorded)"
    return config
