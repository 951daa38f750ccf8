from __future__ import annotations

from typing import Any

from tests.searchers.landscapes import Landscape, toy

from depthsearch.run.borrowed import baseline_names
from depthsearch.searchers import cheap_baselines

SPACE = toy()
HINTS = Landscape(len(SPACE.sites), seed=3).hints()
START: list[dict[str, Any]] = [{"op": "start"}, {"op": "hints", **HINTS.to_json()}]
SUGGESTED = cheap_baselines(SPACE, HINTS)[-1]
OTHER = "0" * len(SPACE.sites)


def entry(name: str, method: str, mask: str, seed: int = 0) -> dict[str, Any]:
    return {"name": name, "method": method, "mask": mask, "seed": seed}


def asked(mask: str, origin: str, final: bool = True) -> list[dict[str, Any]]:
    return [*START, {"op": "ask", "proposals": [{"mask": mask, "origin": origin, "final": final}]}]


def test_what_one_pass_suggests_is_a_baseline_whatever_the_arm_calls_it() -> None:
    key = SUGGESTED.mask.key
    entries = [entry("x", "exhaustive", key), entry("e", "evolution", key)]
    journals = [asked(key, "exhaustive"), asked(key, SUGGESTED.origin)]
    assert baseline_names(SPACE, entries, journals) == [SUGGESTED.origin] * 2
    assert baseline_names(SPACE, entries[:1], journals[:1]) == [SUGGESTED.origin]


def test_what_any_arm_proposed_as_a_baseline_with_that_seed_is_one() -> None:
    entries = [
        entry("x", "exhaustive", OTHER),
        entry("e", "evolution", SUGGESTED.mask.key),
        entry("x", "exhaustive", OTHER, seed=1),
    ]
    journals = [START, asked(OTHER, "single removal of 3"), START]
    assert baseline_names(SPACE, entries, journals)[::2] == ["single removal of 3", None]
    # On the way to the budget it is none.
    journals[1] = asked(OTHER, "single removal of 3", final=False)
    assert baseline_names(SPACE, entries, journals)[0] is None


def test_the_answer_of_a_method_without_a_search_is_one() -> None:
    entries = [entry("x", "exhaustive", OTHER), entry("add", "additive", OTHER)]
    assert baseline_names(SPACE, entries, [START, START])[0] == "the answer of add"
    entries[1]["method"] = "greedy"
    assert baseline_names(SPACE, entries, [START, START])[0] is None
