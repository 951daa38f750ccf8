"""Which answers of searches are masks that need no search, whoever came to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from depthsearch.run.verdict import ONE_PASS
from depthsearch.searchers import cheap_baselines, is_baseline
from depthsearch.space import Hints, SearchSpace

Records = Sequence[Mapping[str, Any]]


def baseline_names(
    space: SearchSpace, entries: Sequence[Mapping[str, Any]], journals: Sequence[Records]
) -> list[str | None]:
    """For each run at one budget the baseline that its answer is, in words, None for no baseline.

    Baselines of a seed are what any of its runs proposed as one, what one pass of the dense model
    suggests whether it was proposed or not, and the answers of methods without a search. So an
    answer is judged by its mask alone, not by which method names it.
    """
    known: dict[int, dict[str, str]] = {}
    for entry, records in zip(entries, journals, strict=True):
        names = known.setdefault(entry["seed"], {})
        for mask, name in _suggested(space, records).items():
            names.setdefault(mask, name)
    for entry in entries:
        if entry["method"] in ONE_PASS:
            known[entry["seed"]].setdefault(entry["mask"], f"the answer of {entry['name']}")
    return [known[entry["seed"]].get(entry["mask"]) for entry in entries]


def _suggested(space: SearchSpace, records: Records) -> dict[str, str]:
    """Baselines that a journal proposes or has the hints for, by mask."""
    found: dict[str, str] = {}
    for record in records:
        if record["op"] == "hints":
            baselines = cheap_baselines(space, Hints.from_json(record))
            found |= {proposal.mask.key: proposal.origin for proposal in baselines}
        elif record["op"] == "ask":
            for proposal in record["proposals"]:
                if proposal["final"] and is_baseline(proposal["origin"]):
                    found.setdefault(proposal["mask"], proposal["origin"])
    return found
