"""The masks that a calibration check ranks: what a search would have to choose between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from depthsearch.errors import ConfigError, NothingFoundError, RunDirectoryError
from depthsearch.journal import Record, read_journal
from depthsearch.run.directory import JOURNAL, understood
from depthsearch.searchers.baselines import influence_baselines, window_baselines
from depthsearch.searchers.evolution import Credit, filled
from depthsearch.searchers.moves import Moves
from depthsearch.searchers.random import FreshMasks
from depthsearch.searchers.ranking import influence_keys
from depthsearch.space import Evaluation, Hints, Mask, Proposal, SearchSpace, Status

_LEAST = 2


def mask_set(
    space: SearchSpace,
    hints: Hints,
    count: int,
    rng: np.random.Generator,
    known: Sequence[Proposal] = (),
) -> tuple[Proposal, ...]:
    """At most `count` masks on budget: cheap baselines, the best `known` ones, and offspring.

    Baselines take half of the places: the influence rankings, then windows by their angle, since
    windows far worse than the rest would make any two texts look as if they agreed. `known`, best
    first, take a quarter, one at least, or what baselines leave free; moves on both fill the rest.
    Raises NothingFoundError where the space has a single mask on budget.
    """
    found: dict[Mask, Proposal] = {}

    def take(proposals: Sequence[Proposal], places: int) -> None:
        for proposal in proposals:
            if places > 0 and proposal.mask not in found:
                found[proposal.mask] = proposal
                places -= 1

    influence = influence_baselines(space, hints)
    take(influence, count // 2)
    take(window_baselines(space, hints), count // 2 - len(found))
    parents = [proposal.mask for proposal in (*known, *found.values())]
    take(known, max(1, count // 4, count // 2 - len(found)))
    fresh = FreshMasks(space, rng)
    for mask in found:
        fresh.add(mask)
    moves = Moves(space, rng, influence_keys(space, hints))
    born = filled(rng, moves, Credit(moves.names), parents[:count], fresh, count, len(found))
    for mask, origin in born.items():
        found[mask] = Proposal(mask, origin if origin == "random" else f"offspring, {origin}")
    _check_count(len(found))
    return tuple(found.values())


def check_masks(space: SearchSpace) -> None:
    """Refuse a space with a single mask on budget; raises NothingFoundError."""
    masks = space.enumerate(_LEAST - 1)
    if masks is not None:
        _check_count(len(masks))


def _check_count(masks: int) -> None:
    if masks < _LEAST:
        raise NothingFoundError(
            f"the space holds {masks} mask on budget, so there is nothing to rank: lower the "
            "budget or protect fewer sites"
        )


def run_masks(run: Path, space: SearchSpace, fingerprint: str) -> tuple[Proposal, ...]:
    """The masks on budget that a run judged on all of its text, finalists first, best first.

    `fingerprint` is that of the model. Raises RunDirectoryError for a run of another model or
    space, or one that has judged no mask yet.
    """
    with understood(run / JOURNAL):
        return _run_masks(run, _records(run), space, fingerprint)


def check_heldout(run: Path, documents: str, heldout_fraction: float) -> None:
    """Refuse a run that may have searched on what a check holds out.

    `documents` is the fingerprint of the check's calibration text, of which it holds out the share
    `heldout_fraction`. A smaller share than the run's is a part of what the run held out. Raises
    ConfigError, and RunDirectoryError where there is no run.
    """
    with understood(run / JOURNAL):
        start = _start(_records(run))
        if start is None:
            return
        theirs = start["signature"]["data"]["documents"]
        fraction = float(start["config"]["calibration"]["heldout_fraction"])
    if theirs != documents:
        raise ConfigError(
            f"{run} searched on another calibration text, which may hold what is held out here: "
            "give the text of the run as calibration.text, or leave --run out"
        )
    if heldout_fraction > fraction:
        raise ConfigError(
            f"calibration.heldout_fraction is {heldout_fraction:g}, but {run} held out "
            f"{fraction:g} and may have searched on the rest: set {fraction:g} or less, or leave "
            "--run out"
        )


def _records(run: Path) -> list[Record]:
    if not (run / JOURNAL).is_file():
        raise RunDirectoryError(
            f"{run} is not a run directory: it has no {JOURNAL}; give one of `depthsearch search`"
        )
    return read_journal(run / JOURNAL)


def _start(records: Sequence[Record]) -> Record | None:
    return next((record for record in records if record["op"] == "start"), None)


def _run_masks(
    run: Path, records: Sequence[Record], space: SearchSpace, fingerprint: str
) -> tuple[Proposal, ...]:
    start = _start(records)
    if start is not None:
        if start["signature"]["model"]["fingerprint"] != fingerprint:
            raise RunDirectoryError(
                f"{run} searched another model (its fingerprint differs): give a run of this one"
            )
        if SearchSpace.from_json(start["space"]).fingerprint != space.fingerprint:
            raise RunDirectoryError(
                f"{run} searched another space or budget: give a run of the configured one"
            )
    origins: dict[str, str] = {}
    judged: dict[bool, list[Evaluation]] = {True: [], False: []}
    for record in records:
        if record["op"] == "ask":
            origins |= {p["mask"]: p["origin"] for p in record["proposals"] if p["final"]}
        elif record["op"] in ("tell", "finals"):
            judged[record["op"] == "finals"] += map(Evaluation.from_json, record["evaluations"])
    ordered = [
        evaluation.mask
        for finals in (True, False)
        for evaluation in sorted(judged[finals], key=lambda e: e.order)
        if evaluation.status is Status.OK and evaluation.mask.key in origins
    ]
    if not ordered:
        raise RunDirectoryError(
            f"{run} has judged no mask on budget yet: wait for it, or leave --run out"
        )
    return tuple(
        Proposal(mask, f"the run's, {origins[mask.key]}") for mask in dict.fromkeys(ordered)
    )
