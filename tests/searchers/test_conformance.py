"""One suite for every registered method: a new one inherits all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from landscapes import (
    FRONTS,
    SPACES,
    Landscape,
    best_final,
    digest,
    drive,
    proposals,
    toy,
    unreliable,
)

from depthsearch.errors import ConfigError, InputError
from depthsearch.searchers import SEARCHERS, Searcher, build_searcher, needs_limit
from depthsearch.space import Evaluation, Proposal, SearchSpace, Status

Arm = tuple[str, dict[str, object]]

ARMS: list[Arm] = [
    *((method, {}) for method in SEARCHERS),
    ("block_influence", {"level": "site", "per_cost": True}),
    *(("fixed", {"strategy": strategy}) for strategy in ("top", "odd", "symmetric")),
    *(("similarity", {"target": target}) for target in ("attention", "ffn")),
    ("sensitivity", {"estimate": "signed"}),
    ("sensitivity", {"estimate": "signed", "per_cost": True}),
    ("additive", {"improve": 5}),
    ("greedy", {"rule": "plain"}),
    ("greedy", {"exchange": 2}),
    ("greedy", {"rule": "plain", "exchange": 3, "exchange_candidates": 4}),
    ("beam", {"rule": "plain", "width": 2, "expand": 0}),
    ("beam", {"width": 3, "expand": 3}),
    ("evolution", {"sweep": False, "guided": False, "parents": 1, "offspring": 5}),
    ("evolution", {"longest_gap": 6, "screen": 0.5}),
    ("evopress", {"offspring": 5, "initial": 3, "screen": 0.5, "generations": 4}),
    ("evopress", {"baselines": True, "runs": True, "generations": 4}),
    ("front", {"sweep": False, "guided": False, "parents": 1, "offspring": 5}),
    ("mcts", {"sweep": False, "baselines": False, "batch": 5}),
    ("mcts", {"exploration": 0.0, "widening": 0.0, "batch": 1}),
    ("mcts", {"widening": 1.0}),
    ("exhaustive", {"batch": 5, "survivors": 2}),
    ("surrogate", {"sweep": False, "offspring": 5, "candidates": 60, "optimism": 0.0}),
    ("surrogate", {"longest_gap": 6, "guided": False, "parents": 1, "screen": 0.5}),
    ("optuna", {"sampler": "cmaes"}),
    ("optuna", {"sampler": "random", "batch": 1}),
    ("optuna", {"sampler": "gp"}),
    ("optuna", {"sampler": "qmc"}),
    ("optuna", {"sampler": "nsga2", "population": 8}),
    ("optuna", {"sampler": "nsga3"}),
    ("optuna", {"baselines": False}),
    ("optuna", {"sampler": "cmaes", "baselines": False}),
]
EXHAUSTING: list[Arm] = [
    arm
    for arm in ARMS
    if arm[0] in ("random", "evolution", "front", "surrogate", "mcts", "exhaustive", "optuna")
]
FRONTED: list[Arm] = [
    ("front", {}),
    ("front", {"sweep": False, "guided": False, "parents": 1, "offspring": 5}),
    *(("optuna", {"sampler": name}) for name in ("tpe", "qmc", "nsga2", "nsga3", "random")),
    ("optuna", {"sampler": "nsga2", "population": 8, "batch": 1}),
    ("optuna", {"sampler": "nsga2", "baselines": False}),
]
"""Methods that serve several budgets at once."""
LIMIT = 70
DEAR = {"optuna-sampler=gp": 14}
"""Arms that take long over each mask once they have 10, and after how many they are stopped."""


def arm_name(arm: Arm) -> str:
    return "-".join([arm[0], *(f"{key}={value}" for key, value in arm[1].items())])


every_arm = pytest.mark.parametrize("arm", ARMS, ids=arm_name)
every_front = pytest.mark.parametrize(
    ("arm", "space"),
    [pytest.param(a, s, id=f"{arm_name(a)}-{n}") for a in FRONTED for n, s in FRONTS.items()],
)


def build(arm: Arm, space: SearchSpace, landscape: Landscape, seed: int = 0) -> Searcher:
    method, options = arm
    return build_searcher(method, space, landscape.hints(), np.random.default_rng(seed), options)


def limit_of(arm: Arm) -> int:
    return DEAR.get(arm_name(arm), LIMIT)


def landscape_of(space: SearchSpace, seed: int = 0) -> Landscape:
    return Landscape(len(space.sites), seed)


@every_arm
@pytest.mark.parametrize("name", SPACES)
def test_proposals_are_distinct_and_final_exactly_on_budget(arm: Arm, name: str) -> None:
    space = SPACES[name]
    landscape = landscape_of(space)
    searcher = build(arm, space, landscape)
    assert searcher.name == arm[0]
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=limit_of(arm))
    asked = proposals(record)
    assert any(proposal.final for proposal in asked)
    assert len({proposal.mask for proposal in asked}) == len(asked)
    for proposal in asked:
        assert proposal.final == space.on_budget(proposal.mask), proposal
        assert proposal.origin


@every_arm
@pytest.mark.parametrize("n", [1, 3])
def test_small_asks_keep_every_promise(arm: Arm, n: int) -> None:
    space = SPACES["sublayer"]
    landscape = landscape_of(space)
    answer = unreliable(landscape, 0.3)
    record = drive(build(arm, space, landscape), answer, n=n, limit=limit_of(arm))
    asked = proposals(record)
    assert len({proposal.mask for proposal in asked}) == len(asked)
    assert all(proposal.final == space.on_budget(proposal.mask) for proposal in asked)
    complete: set[str] = set()
    for batch, evaluations in record:
        assert 1 <= len(batch.proposals) <= n
        assert complete.issuperset(mask.key for mask in batch.rivals)
        if batch.survivors is None:
            assert batch.rivals == ()
        else:
            assert len(batch.rivals) <= batch.survivors
        complete.update(e.mask.key for e in evaluations if e.status is Status.OK)


@every_arm
@pytest.mark.parametrize("failing", [0.4, 1.0])
def test_survives_failed_and_eliminated_evaluations(arm: Arm, failing: float) -> None:
    space = SPACES["sublayer_kv"]
    landscape = landscape_of(space)
    record = drive(
        build(arm, space, landscape), unreliable(landscape, failing), limit=limit_of(arm)
    )
    asked = proposals(record)
    assert asked
    assert len({proposal.mask for proposal in asked}) == len(asked)


@every_arm
def test_survives_losing_everything(arm: Arm) -> None:
    space = SPACES["packable"]
    landscape = landscape_of(space)

    def fail(proposal: Proposal) -> Evaluation:
        return Evaluation(proposal.mask, (), 0, Status.FAILED)

    asked = proposals(drive(build(arm, space, landscape), fail, limit=limit_of(arm)))
    assert asked
    assert len({proposal.mask for proposal in asked}) == len(asked)


@every_arm
def test_survives_a_cut_set(arm: Arm) -> None:
    space = SPACES["sublayer"]
    landscape = landscape_of(space)
    searcher = build(arm, space, landscape)
    seen: set[str] = set()
    for _ in range(8):
        batch = searcher.ask()
        keys = [proposal.mask.key for proposal in batch.proposals]
        assert seen.isdisjoint(keys)
        seen.update(keys)
        told = batch.proposals[: len(batch.proposals) // 2]
        searcher.tell([landscape.evaluate(proposal.mask) for proposal in told])


@every_arm
def test_a_replay_asks_the_same(arm: Arm) -> None:
    space = SPACES["sublayer"]
    landscape = landscape_of(space)
    record = drive(build(arm, space, landscape), unreliable(landscape, 0.2), limit=limit_of(arm))
    again = build(arm, space, landscape)
    for batch, evaluations in record:
        assert again.ask() == batch
        again.tell([Evaluation.from_json(json.loads(json.dumps(e.to_json()))) for e in evaluations])


@pytest.mark.parametrize("arm", EXHAUSTING, ids=arm_name)
@pytest.mark.parametrize("name", ["drop_blocks", "sublayer_kv", "drop_one", "dense_fits"])
def test_stops_when_the_space_is_exhausted(arm: Arm, name: str) -> None:
    space = SPACES[name]
    landscape = landscape_of(space)
    searcher = build(arm, space, landscape)
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=1000)
    masks = space.enumerate()
    assert masks is not None
    assert {p.mask for p in proposals(record) if p.final} == set(masks)
    assert searcher.ask().proposals == ()
    assert searcher.ask(3).proposals == ()


# `exhaustive` refuses what it can't list.
@pytest.mark.parametrize("method", [m for m in SEARCHERS if m != "exhaustive"])
def test_what_ends_by_itself_needs_no_limit(method: str) -> None:
    space = toy(10)
    landscape, most = landscape_of(space), 100 if needs_limit(method) else 1000
    searcher = build((method, {}), space, landscape)
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=most)
    assert (len(proposals(record)) >= most) == needs_limit(method)


@every_front
@pytest.mark.parametrize("n", [None, 3])
def test_a_front_keeps_every_promise(arm: Arm, space: SearchSpace, n: int | None) -> None:
    landscape = landscape_of(space)
    record = drive(build(arm, space, landscape), unreliable(landscape, 0.3), n=n, limit=120)
    asked = proposals(record)
    assert len({proposal.mask for proposal in asked}) == len(asked)
    assert all(proposal.final == space.meets(proposal.mask) for proposal in asked)
    assert all(any(p.final and at.fits(p.mask) for p in asked) for at in space.points)
    complete: set[str] = set()
    for batch, evaluations in record:
        assert n is None or len(batch.proposals) <= n
        assert complete.issuperset(mask.key for mask in batch.rivals)
        raced = [p.mask for p in batch.proposals if p.final] + list(batch.rivals)
        swept = any(p.origin in ("dense", "sweep") for p in batch.proposals)
        if batch.rivals and not swept:
            # Losses at different budgets are no rivals.
            assert any(all(at.on_budget(mask) for mask in raced) for at in space.points)
        complete.update(e.mask.key for e in evaluations if e.status is Status.OK)


@every_front
def test_a_front_is_asked_for_again_in_a_replay(arm: Arm, space: SearchSpace) -> None:
    landscape = landscape_of(space)
    record = drive(build(arm, space, landscape), unreliable(landscape, 0.2), limit=LIMIT)
    again = build(arm, space, landscape)
    for batch, evaluations in record:
        assert again.ask() == batch
        again.tell([Evaluation.from_json(json.loads(json.dumps(e.to_json()))) for e in evaluations])


@every_front
def test_a_front_survives_a_cut_set_and_losing_everything(arm: Arm, space: SearchSpace) -> None:
    landscape = landscape_of(space)
    searcher = build(arm, space, landscape)
    seen: set[str] = set()
    for turn in range(12):
        batch = searcher.ask()
        keys = [proposal.mask.key for proposal in batch.proposals]
        assert seen.isdisjoint(keys)
        seen.update(keys)
        told = batch.proposals[: len(batch.proposals) // (1 + turn % 2)]
        searcher.tell([Evaluation(proposal.mask, (), 0, Status.FAILED) for proposal in told])


@every_front
def test_a_front_stops_when_every_budget_is_exhausted(arm: Arm, space: SearchSpace) -> None:
    landscape = landscape_of(space)
    searcher = build(arm, space, landscape)
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=1000)
    masks = {mask for point in space.points for mask in point.enumerate() or ()}
    assert {p.mask for p in proposals(record) if p.final} == masks
    assert searcher.ask().proposals == ()


BOUNDS = {
    "random": (0, 0),
    "block_influence": (10, 5),
    "block_influence-level=site-per_cost=True": (3, 1),
    "fixed": (12, 6),
    "fixed-strategy=top": (94, 48),
    "fixed-strategy=odd": (45, 60),
    "fixed-strategy=symmetric": (15, 9),
    "similarity": (1, 1),
    "similarity-target=attention": (118, 1),
    "similarity-target=ffn": (3, 1),
    "sensitivity": (1, 23),
    "sensitivity-estimate=signed": (1, 0),
    "sensitivity-estimate=signed-per_cost=True": (10, 0),
    "angular_window": (10, 12),
    "single_removal": (1, 0),
    "additive": (3, 0),
    "additive-improve=5": (0, 0),
    "windows": (10, 8),
    "greedy": (0, 0),
    "greedy-rule=plain": (0, 0),
    "evolution": (0, 0),
    "evopress": (3, 0),
    "optuna": (0, 0),
    "optuna-sampler=nsga3": (1, 0),
}
"""By arm: how many masks of the `sublayer` and the `packable` space are better than its best.

Of 136 and 66. Searches must find the optimum; the one-shot methods reach what was measured here,
and NSGA-III, which needs more than 80 evaluations for its generations to tell, the second.
"""


@every_arm
@pytest.mark.parametrize(("place", "name"), [(0, "sublayer"), (1, "packable")])
def test_reaches_its_bound_on_a_brute_forced_space(arm: Arm, place: int, name: str) -> None:
    space = SPACES[name]
    landscape = landscape_of(space)
    masks = space.enumerate()
    assert masks is not None
    losses = sorted(float(np.mean(landscape.losses(mask))) for mask in masks)
    limit = 1000 if "random" in arm_name(arm) else 40 if arm_name(arm) in DEAR else 80
    record = drive(build(arm, space, landscape), lambda p: landscape.evaluate(p.mask), limit=limit)
    loss = best_final(record).loss
    assert loss is not None
    better = sum(other < loss - 1e-12 for other in losses)
    assert better <= BOUNDS.get(arm_name(arm), BOUNDS.get(arm[0], (0, 0)))[place]


def asked_by_every_arm() -> dict[str, str]:
    """The digest of what each arm asks for, for the test across processes."""
    space = SPACES["sublayer"]
    landscape = landscape_of(space)
    return {
        arm_name(arm): digest(
            [
                proposal.mask
                for proposal in proposals(
                    drive(
                        build(arm, space, landscape),
                        lambda p: landscape.evaluate(p.mask),
                        limit=min(40, limit_of(arm)),
                    )
                )
            ]
        )
        for arm in ARMS
    }


@pytest.fixture(scope="module")
def digests() -> list[dict[str, str]]:
    """`asked_by_every_arm` in two fresh processes whose string hashes differ."""
    found = []
    for seed in ("1", "2"):
        result = subprocess.run(
            [
                sys.executable,
                "-c",
                "import json, test_conformance as t; print(json.dumps(t.asked_by_every_arm()))",
            ],
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(result.stdout))
    return found


@every_arm
def test_fresh_processes_propose_the_same(arm: Arm, digests: list[dict[str, str]]) -> None:
    first, second = digests
    assert first[arm_name(arm)] == second[arm_name(arm)]


def test_seeds_matter() -> None:
    space = SPACES["sublayer"]
    landscape = landscape_of(space)
    asked = [
        digest([p.mask for p in build(("random", {}), space, landscape, seed).ask().proposals])
        for seed in (0, 1)
    ]
    assert asked[0] != asked[1]


@every_arm
def test_misuse_is_refused(arm: Arm) -> None:
    space = SPACES["sublayer"]
    landscape = landscape_of(space)
    searcher = build(arm, space, landscape)
    with pytest.raises(InputError, match="n=0"):
        searcher.ask(0)
    batch = searcher.ask(1)
    with pytest.raises(InputError, match="call tell first"):
        searcher.ask()
    evaluation = landscape.evaluate(batch.proposals[0].mask)
    with pytest.raises(InputError, match="2 evaluations were told"):
        searcher.tell([evaluation, evaluation])
    with pytest.raises(InputError, match="in its order"):
        searcher.tell([landscape.evaluate(space.smallest())])
    searcher.tell([evaluation])


@pytest.mark.parametrize("method", SEARCHERS)
def test_unknown_options_are_refused_with_the_method(method: str) -> None:
    space = SPACES["sublayer"]
    with pytest.raises(ConfigError, match=f"unknown option 'nonsense' of the method '{method}'"):
        build((method, {"nonsense": 1}), space, landscape_of(space))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("evolutoin", {}, "did you mean 'evolution'"),
        ("evolution", {"ofspring": 3}, "did you mean 'offspring'"),
        ("evolution", {"offspring": "many"}, "takes a whole number: got 'many'"),
        ("evolution", {"offspring": True}, "takes a whole number: got True"),
        ("evolution", {"offspring": 1.5}, r"takes a whole number: got 1\.5"),
        ("evolution", {"parents": 0.0}, "'parents' is at least 1: got 0"),
        ("evolution", {"parents": 0}, "'parents' is at least 1: got 0"),
        ("evolution", {"sweep": 1}, "takes true or false: got 1"),
        ("greedy", {"rule": "cheap"}, "one of cost_aware, plain: got 'cheap'"),
        ("greedy", {"exchange": -1}, "'exchange' is at least 0: got -1"),
        ("greedy", {"exchange_candidates": 0}, "'exchange_candidates' is at least 1: got 0"),
        ("beam", {"width": 0}, "'width' is at least 1: got 0"),
        ("beam", {"expand": -1}, "'expand' is at least 0: got -1"),
        ("random", {"batch": 0}, "'batch' is at least 1"),
        ("sensitivity", {"estimate": "abs"}, "one of magnitude, signed: got 'abs'"),
        ("optuna", {"storage": 3}, "takes text or null: got 3"),
    ],
)
def test_wrong_settings_are_one_clear_line(
    method: str, options: dict[str, object], message: str
) -> None:
    space = SPACES["sublayer"]
    with pytest.raises(ConfigError, match=message) as caught:
        build((method, options), space, landscape_of(space))
    assert "\n" not in str(caught.value)
