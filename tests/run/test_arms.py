"""Names and settings of the runs of a comparison."""

from __future__ import annotations

from typing import Any

import pytest
from tests.tiny_runs import SETTINGS

from depthsearch.config import RunConfig, config_from_mapping
from depthsearch.errors import ConfigError
from depthsearch.run.arms import arm_config, arm_runs, arm_search, budgets_of, cost_first

ARMS = {"a": {"method": "windows"}, "b": {"method": "greedy"}}
BUDGETS = [
    {"keep_params": 0.75, "of": "blocks"},
    {"keep_kv_bytes": "12 kB"},
    {"keep_flops": 0.5, "context_tokens": 64},
    {"drop_sites": 2},
]


def configured(**compare: Any) -> RunConfig:
    return config_from_mapping({**SETTINGS, "compare": {"arms": ARMS, **compare}})


def test_one_budget_needs_no_name() -> None:
    plain = configured(seeds=[0, 7])
    assert plain.compare is not None
    names = [run.name for run in arm_runs(plain.compare)]
    assert names == ["a-seed0", "b-seed0", "a-seed7", "b-seed7"]
    assert budgets_of(plain) == (plain.space.budget,)
    other = configured(seeds=[0, 7], budgets=BUDGETS[3:])
    assert other.compare is not None
    assert [run.name for run in arm_runs(other.compare)] == names
    (budget,) = budgets_of(other)
    assert budget.drop_sites == 2
    run = arm_runs(other.compare)[0]
    assert arm_config(other, run, arm_search(other, run, None)).space.budget.drop_sites == 2


def test_several_budgets_name_their_runs() -> None:
    config = configured(seeds=[3], budgets=BUDGETS, cost_tokens="b")
    assert config.compare is not None
    runs = arm_runs(config.compare, cost_first(config.compare))
    assert [run.name for run in runs] == [
        "b-keep_params-0.75-of-blocks-seed3",
        "a-keep_params-0.75-of-blocks-seed3",
        "b-keep_kv_bytes-12kb-seed3",
        "a-keep_kv_bytes-12kb-seed3",
        "b-keep_flops-0.5-at-64-seed3",
        "a-keep_flops-0.5-at-64-seed3",
        "b-drop_sites-2-seed3",
        "a-drop_sites-2-seed3",
    ]
    assert [run.place for run in runs] == [0, 0, 1, 1, 2, 2, 3, 3]
    alone = arm_config(config, runs[3], arm_search(config, runs[3], 77.0))
    assert alone.space.budget.keep_kv_bytes == "12 kB"
    assert alone.compare is None
    assert (alone.search.method, alone.search.seed, alone.search.cost_tokens) == ("windows", 3, 77)
    assert arm_search(config, runs[2], 77.0).cost_tokens is None


def test_runs_that_share_a_storage_have_studies_of_their_own() -> None:
    storage = {"method": "optuna", "options": {"storage": "sqlite:///x", "study_name": "mine"}}
    config = configured(arms={"o": storage}, seeds=[0, 1], budgets=BUDGETS[:2])
    assert config.compare is not None
    names = [
        arm_search(config, run, None).options["study_name"] for run in arm_runs(config.compare)
    ]
    assert len(set(names)) == 4
    assert names[0] == "mine-o-keep_params-0.75-of-blocks-seed0"


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"keep_params": 0.5}, "must be a list, such as"),
        ([{"keep_params": 0.5}, {"keep_params": 0.50}], "each budget may appear once"),
        ([{"keep_parms": 0.5}], "'compare.budgets.0.keep_parms'; did you mean 'keep_params'"),
        ([{"keep_params": 1.5}], "compare.budgets.0.keep_params is 1.5; a ratio lies in"),
        ([{}], "takes exactly one of"),
    ],
)
def test_budgets_that_mean_nothing(budgets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(budgets=budgets)
