"""A searcher as a journal leaves it: what it asked for is repeated, with the losses of then.

Needs neither the model nor its text, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depthsearch.config import SearchConfig
from depthsearch.errors import InputError, JournalError
from depthsearch.searchers import Searcher, build_searcher
from depthsearch.space import Evaluation, Hints, Mask, Proposal, SearchSpace

_LONGEST_GAP = 6


def searcher_options(search: SearchConfig) -> dict[str, Any]:
    """The options of the searcher, with defaults that follow from other settings."""
    defaults: dict[str, Any] = {}
    if search.method in ("evolution", "surrogate") and search.repair != "none":
        # Repaired gaps nearly add up, so what they add up to is the best start there is.
        defaults["longest_gap"] = _LONGEST_GAP
    if search.method == "optuna" and search.batch is not None:
        # A searcher is asked for so many at most, and this one's own batches may be smaller.
        defaults["batch"] = search.batch
    return defaults | search.options


def searcher_rng(seed: int) -> np.random.Generator:
    """Where everything random in a searcher comes from."""
    return np.random.default_rng([seed, 1])


def ask_size(ask: int | None, max_evaluations: int | None, known: int) -> int | None:
    """How many masks are asked for next when `known` were judged; None for the natural set."""
    if max_evaluations is None:
        return ask
    left = max(1, max_evaluations - known)
    return left if ask is None else min(left, ask)


def replayed(records: Sequence[Mapping[str, Any]]) -> Searcher:
    """The searcher after the last answered ask of a journal; unanswered ones are not asked again.

    Raises JournalError for a journal without hints, or one that another version wrote, whose asks
    come out differently; InputError for a search that keeps a storage of its own.
    """
    by_op = {str(record["op"]): record for record in records[:2]}
    if not {"start", "hints"} <= set(by_op):
        raise JournalError("the journal ends before the search began: there is nothing to repeat")
    search = SearchConfig.model_validate(by_op["start"]["config"]["search"])
    if search.options.get("storage") is not None:
        raise InputError("a search with a storage of its own can't be repeated beside it")
    searcher = build_searcher(
        search.method,
        SearchSpace.from_json(by_op["start"]["space"]),
        Hints.from_json(by_op["hints"]),
        searcher_rng(search.seed),
        searcher_options(search),
    )
    known: set[Mask] = set()
    asked: tuple[Proposal, ...] = ()
    for record in records[2:]:
        if record["op"] == "ask":
            asked = tuple(Proposal.from_json(entry) for entry in record["proposals"])
        elif record["op"] == "tell":
            size = ask_size(search.batch, search.max_evaluations, len(known))
            if searcher.ask(size).proposals[: len(asked)] != asked:
                raise JournalError(
                    f"repeating the search gives another ask {record['id']} than the journal's: "
                    "another version, or another library, wrote it"
                )
            searcher.tell([Evaluation.from_json(entry) for entry in record["evaluations"]])
            known.update(proposal.mask for proposal in asked)
    return searcher
