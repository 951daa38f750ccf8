"""Compare search methods: arms at equal cost, seeds and budgets, figures on held-out data.

Each arm, seed and budget is an ordinary run directory, so a comparison is resumable and each of its
runs can be reported, resumed or exported on its own.

compare.json holds at one budget what `section` in standing.py returns beside what all runs share;
at several, `budgets` is a list of such sections.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from depthsearch import __version__
from depthsearch.config import BudgetConfig, RunConfig, SearchConfig, load_config, resolved_yaml
from depthsearch.errors import (
    ConfigError,
    InputError,
    ModelError,
    NothingFoundError,
    RunDirectoryError,
)
from depthsearch.journal import read_journal
from depthsearch.run.anytime import Improvement, improvements, spaced
from depthsearch.run.arms import arm_config, arm_runs, arm_search, budgets_of, cost_first
from depthsearch.run.borrowed import baseline_names
from depthsearch.run.directory import (
    ARMS,
    BEST,
    COMPARE,
    CONFIG,
    JOURNAL,
    create_directory,
    occupied,
    read_json,
    write_json,
)
from depthsearch.run.heldout import Heldout, Measured, OnHeldout, measure
from depthsearch.run.loop import OnProgress
from depthsearch.run.search import Finish, check_limit, check_run, check_unchanged, resume, search
from depthsearch.run.session import Session, check_search, opened
from depthsearch.run.spaces import make_space
from depthsearch.run.standing import NOTHING, measured_entry, ranks_of, section
from depthsearch.run.tasks import check_task
from depthsearch.run.verdict import FEW_DOCUMENTS, ONE_SEED, few_documents, overall
from depthsearch.run.watching import working_seconds
from depthsearch.run.workers import check_gradients, check_repair

OnArm = Callable[[str, int, int, int], OnProgress | None]

OVERFLOW = "its losses on held-out text are not finite: load the model in float32 (model.dtype)"
"""Said of an arm whose answer can't be measured."""


def compare(
    config: RunConfig,
    out: Path,
    *,
    session: Session | None = None,
    on_arm: OnArm | None = None,
    on_heldout: OnHeldout | None = None,
    finish: Finish | None = None,
) -> dict[str, Any]:
    """Run every arm with every seed at every budget below `out`, measure all, and sum up.

    An `out` that holds the same comparison, unfinished, is continued. `on_arm(arm, seed, runs
    done, runs)`, the arm with its budget before it where there are several, is called before each
    run and may return its progress callback, `on_heldout(batches done, batches)` while held-out
    text is scored. Returns what
    compare.json holds. Raises ConfigError without arms, RunDirectoryError where `out` holds
    something else.
    """
    if config.compare is None:
        raise ConfigError(
            "the configuration has no 'compare' part: name at least one arm under compare.arms, "
            "such as {greedy: {method: greedy}, evolution: {method: evolution}}"
        )
    for settings in config.compare.arms.values():
        check_search(settings)
        check_repair(config, settings)
        check_gradients(config, settings)
        check_task(config, settings)
    for run in arm_runs(config.compare):
        # What the arm gets that waits for another's cost is a limit, whatever it is.
        check_limit(arm_search(config, run, math.inf), run.arm)
    _check_out(config, out)
    with opened(config, session) as session:
        return _compare(config, out, session, on_arm, on_heldout, finish)


def _compare(
    config: RunConfig,
    out: Path,
    session: Session,
    on_arm: OnArm | None,
    on_heldout: OnHeldout | None,
    finish: Finish | None,
) -> dict[str, Any]:
    assert config.compare is not None
    splits = [session.splits(seed) for seed in config.compare.seeds]
    if len(splits[0].heldout) < 2:
        raise ConfigError(
            "a comparison needs at least 2 held-out windows for its intervals: raise "
            "calibration.heldout_tokens"
        )
    sessions = [_at(session, budget) for budget in budgets_of(config)]
    _check_runs(config, out, sessions)
    if not out.exists():
        create_directory(out, {CONFIG: resolved_yaml(config)})
    entries, failed = _run_all(config, out, sessions, on_arm, finish)
    improved: dict[str, list[Improvement]] = {}
    for at, found in zip(sessions, entries, strict=True):
        journals = [read_journal(out / entry["run"] / JOURNAL) for entry in found]
        names = baseline_names(at.space, found, journals)
        for entry, records, name in zip(found, journals, names, strict=True):
            entry["baseline"] = name
            improved[entry["run"]] = spaced(improvements(records), config.compare.anytime)
    heldout = measure(
        session,
        splits[0].heldout,
        [
            Measured(
                entry["run"],
                replace(at, config=load_config(out / entry["run"] / CONFIG)),
                out / entry["run"],
                entry["mask"],
                tuple(found.mask for found in improved[entry["run"]]),
                entry["repair"],
            )
            for at, found in zip(sessions, entries, strict=True)
            for entry in found
        ],
        on_heldout,
    )
    entries = _leave_out_overflows(entries, failed, improved, heldout, len(config.compare.seeds))
    measured = [
        [measured_entry(entry, improved[entry["run"]], heldout) for entry in found]
        for found in entries
    ]
    sections = [
        _section(config, at, found, lost, heldout)
        for at, found, lost in zip(sessions, measured, failed, strict=True)
    ]
    seeds, arms = config.compare.seeds, list(config.compare.arms.values())
    dense = heldout.cut[session.space.dense.key]
    shared = {
        "version": __version__,
        "signature": session.signature(splits[0], seeds[0], arms) | {"seed": list(seeds)},
        "sites": [site.name for site in session.space.sites],
        "dense": {
            "heldout_kl": float(np.mean(dense.kl)),
            "heldout_ce": float(np.mean(dense.ce)),
            "perplexity": float(np.exp(np.mean(dense.ce))),
        },
    }
    result = shared | _joined(sections, measured)
    documents = len(splits[0].heldout_texts)
    if documents < FEW_DOCUMENTS:
        result["verdict"] += f" {few_documents(documents)}"
    if len(seeds) == 1:
        result["verdict"] += f" {ONE_SEED}"
    write_json(out / COMPARE, result)
    return result


def _at(session: Session, budget: BudgetConfig) -> Session:
    """The session at another budget; raises BudgetError where no mask meets it."""
    space = session.config.space
    if budget == space.budget:
        return session
    space = space.model_copy(update={"budget": budget})
    return replace(
        session,
        config=session.config.model_copy(update={"space": space}),
        space=make_space(space, session.loaded.model, session.anatomy, session.latency),
    )


def _check_runs(config: RunConfig, out: Path, sessions: Sequence[Session]) -> None:
    """Refuse, before any run starts, what one of them would be refused for; raises InputError.

    Runs that are there must have been on the same model and text as those to come.
    """
    assert config.compare is not None
    for run in arm_runs(config.compare):
        path = out / ARMS / run.name
        # What waits for another's cost is checked without a limit on it.
        chosen = arm_search(config, run, math.inf)
        alone = replace(sessions[run.place], config=arm_config(config, run, chosen))
        if occupied(path):
            check_unchanged(alone, path)
            continue
        try:
            check_run(alone)
        except InputError as error:
            raise type(error)(f"the arm '{run.title}': {_said(config, error)}") from error


def _said(config: RunConfig, error: InputError) -> str:
    """What an arm failed of, in terms of the setting that its limit on cost is from."""
    assert config.compare is not None
    limit, text = config.compare.cost_tokens, str(error)
    if limit is None:
        return text
    name = f"the cost of the arm '{limit}'" if isinstance(limit, str) else "compare.cost_tokens"
    return text.replace("search.cost_tokens", name)


def _run_all(
    config: RunConfig,
    out: Path,
    sessions: Sequence[Session],
    on_arm: OnArm | None,
    finish: Finish | None,
) -> tuple[list[list[dict[str, Any]]], list[list[dict[str, Any]]]]:
    """What every run came to, and which failed, both by budget.

    Left out are the runs of arms that failed with another seed at that budget. Raises
    NothingFoundError where nothing is left, or where all others wait for an arm that failed.
    """
    assert config.compare is not None
    setter, costs = config.compare.cost_tokens, dict[tuple[int, int], float]()
    entries: list[list[dict[str, Any]]] = [[] for _ in sessions]
    failed: list[list[dict[str, Any]]] = [[] for _ in sessions]
    runs = arm_runs(config.compare, cost_first(config.compare))
    for done, run in enumerate(runs):
        key = (run.place, run.seed)
        if isinstance(setter, str) and run.arm != setter and key not in costs:
            error = f"the arm '{setter}', whose cost it was to get, failed"
            failed[run.place].append({"name": run.arm, "seed": run.seed, "error": error})
            continue
        chosen = arm_search(config, run, costs.get(key))
        path = out / ARMS / run.name
        on_progress = on_arm(run.title, run.seed, done, len(runs)) if on_arm is not None else None
        try:
            alone = replace(sessions[run.place], config=arm_config(config, run, chosen))
            _run_arm(alone, path, on_progress, finish)
        except (ConfigError, NothingFoundError, ModelError) as error:
            if run.arm == setter and len(sessions) == 1:
                raise NothingFoundError(
                    f"the arm '{run.arm}', whose cost the others get, failed with seed "
                    f"{run.seed}: {_said(config, error)}"
                ) from error
            said = {"name": run.arm, "seed": run.seed, "error": _said(config, error)}
            failed[run.place].append(said)
            continue
        entry = _entry(run.arm, chosen, chosen.score or config.objective.kind, path)
        entries[run.place].append(entry)
        if run.arm == setter:
            costs[key] = entry["cost_tokens"]
    whole = [_complete(found, len(config.compare.seeds)) for found in entries]
    if not any(whole):
        first = next(lost[0]["error"] for lost in failed if lost)
        raise NothingFoundError(f"no arm finished with every seed; the first: {first}")
    return whole, failed


def _complete(entries: list[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """The runs of the arms that finished with every seed."""
    counts = Counter(entry["name"] for entry in entries)
    return [entry for entry in entries if counts[entry["name"]] == seeds]


def _leave_out_overflows(
    entries: Sequence[Sequence[dict[str, Any]]],
    failed: Sequence[list[dict[str, Any]]],
    improved: dict[str, list[Improvement]],
    heldout: Heldout,
    seeds: int,
) -> list[list[dict[str, Any]]]:
    """The runs of arms whose answers have finite losses on held-out text; others go to `failed`.

    Of masks on the way, those without are no longer shown. Raises NothingFoundError where no arm
    is left.
    """
    whole: list[list[dict[str, Any]]] = []
    for found, lost in zip(entries, failed, strict=True):
        finite = [entry for entry in found if heldout.finite(entry["run"], entry["mask"])]
        lost += [
            {"name": entry["name"], "seed": entry["seed"], "error": OVERFLOW}
            for entry in found
            if entry not in finite
        ]
        whole.append(_complete(finite, seeds))
    if not any(whole):
        raise NothingFoundError(f"no arm finished with every seed; the first: {OVERFLOW}")
    for run, shown in improved.items():
        improved[run] = [step for step in shown if heldout.finite(run, step.mask)]
    return whole


def _section(
    config: RunConfig,
    session: Session,
    entries: Sequence[Mapping[str, Any]],
    failed: Sequence[Mapping[str, Any]],
    heldout: Heldout,
) -> dict[str, Any]:
    """All about one budget, empty of figures where no arm finished with every seed."""
    assert config.compare is not None
    space = session.space
    about = {
        "budget": session.config.space.budget.label,
        "budget_text": space.budget.text,
        "cap": space.cap,
        "dense_cost": space.cost(space.dense),
        "failed": list(failed),
    }
    if not entries:
        return about | NOTHING
    arms, anytime = list(config.compare.arms), config.compare.anytime > 0
    return about | section(arms, entries, heldout, anytime)


def _joined(
    sections: Sequence[Mapping[str, Any]], measured: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """One budget's section as it is, or several below `budgets` with what they say together."""
    if len(sections) == 1:
        return dict(sections[0])
    known = [found for found in measured if found]
    ranks = ranks_of(known)
    return {
        "cost_tokens": float(np.mean([e["cost_tokens"] for found in known for e in found])),
        "budgets": list(sections),
        "ranks": ranks,
        "verdict": overall(sections, ranks),
    }


def read_compare(out: Path) -> dict[str, Any]:
    """compare.json, with the exports made from its arms; raises RunDirectoryError."""
    data = read_json(out / COMPARE, "it is no finished comparison")
    exports = sorted(
        (out / ARMS).glob("*/export.json"), key=lambda path: (path.stat().st_mtime, path)
    )
    if exports:
        # One table: that of the arm exported last.
        data["export"] = read_json(exports[-1], "no export")
    return data


def _check_out(config: RunConfig, out: Path) -> None:
    """Refuse an `out` that is neither new nor this very comparison, unfinished."""
    if not occupied(out):
        return
    if occupied(out / COMPARE):
        raise RunDirectoryError(
            f"{out} holds a finished comparison and is never overwritten: choose another --out"
        )
    if not (out / CONFIG).is_file() or (out / JOURNAL).exists():
        raise RunDirectoryError(f"{out} exists and is not a comparison: choose another --out")
    if load_config(out / CONFIG) != config:
        raise RunDirectoryError(
            f"{out} holds an unfinished comparison with another configuration: continue it with "
            f"`depthsearch compare {out / CONFIG} --out {out}`, or choose another --out"
        )


def _run_arm(
    session: Session, run: Path, on_progress: OnProgress | None, finish: Finish | None
) -> None:
    if (run / BEST).exists():
        return
    if run.exists():
        resume(run, session=session, on_progress=on_progress, finish=finish)
    else:
        search(session.config, run, session=session, on_progress=on_progress, finish=finish)


def _entry(arm: str, chosen: SearchConfig, score: str, run: Path) -> dict[str, Any]:
    best = read_json(run / BEST, "the run has not finished")
    records = read_journal(run / JOURNAL)
    return {
        "name": arm,
        "method": chosen.method,
        "seed": chosen.seed,
        "score": score,
        "run": f"{ARMS}/{run.name}",
        "mask": best["mask"],
        "origin": best["origin"],
        "cost": best["cost"],
        "cost_tokens": best["cost_tokens"],
        "evaluations": best["evaluations"],
        "seconds": round(working_seconds(records), 1),
        "select_loss": best["loss"],
        "finals_loss": best["finals_loss"],
        "search_repair": chosen.repair,
        "repair": best.get("repair"),
        "toward_text": chosen.toward_text,
        "anytime": [[found.cost_tokens, found.loss] for found in improvements(records)],
    }
