"""Budgets and costs: what is allowed, what it means in whole units."""

from __future__ import annotations

import math

import pytest

from depthsearch.errors import BudgetError
from depthsearch.space import Budget, CostTable, Mask, Site, SiteCosts

SITES = tuple(Site(i, "decoder", i // 2, ("attention", "ffn")[i % 2]) for i in range(4))
COSTS = SiteCosts(1000, (10, 30, 11, 29), (((0, 1), 5), ((2, 3), 6)))
TIMES = SiteCosts(2_000_000, (1_000_000, 2_000_000, 1_000_000, 2_000_000))
TABLE = CostTable({"params": COSTS, "kv_bytes": SiteCosts(0, (4, 0, 4, 0)), "latency": TIMES})


def test_costs_count_shared_parts_until_the_last_sharer_goes() -> None:
    assert TABLE.total("params") == 1091
    assert TABLE.cost("params", Mask.from_key("1111")) == 1091
    assert TABLE.cost("params", Mask.from_key("0111")) == 1081
    assert TABLE.cost("params", Mask.from_key("0011")) == 1046
    assert TABLE.cost("params", Mask.from_key("0000")) == 1000
    assert CostTable.from_json(TABLE.to_json()) == TABLE


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(BudgetError, match="no costs are known for 'energy': expected one of"):
        TABLE.cost("energy", Mask.dense(4))


@pytest.mark.parametrize(
    ("budget", "cap", "text"),
    [
        (Budget("params", ratio=0.5), 545, "params at most 50 % of the dense model"),
        (
            Budget("params", ratio=0.5, of="blocks"),
            1045,
            "params at most 50 % of the dense model's blocks",
        ),
        (Budget("params", cap=1050), 1050, "params at most 1,050"),
        (Budget("latency", cap=12_500_000), 12_500_000, "latency at most 12.5 ms"),
        (Budget("latency", ratio=0.75), 6_000_000, "latency at most 75 % of the dense model"),
        (Budget("kv_bytes", ratio=0.5), 4, "kv_bytes at most 50 % of the dense model"),
        (Budget("sites", drop=3), 1, "3 sites dropped"),
        (Budget("blocks", drop=1), 1, "1 blocks dropped"),
    ],
)
def test_caps_are_whole_units(budget: Budget, cap: int, text: str) -> None:
    assert budget.cap_for(budget.costs(TABLE, SITES)) == cap
    assert budget.text == text
    assert Budget.from_json(budget.to_json()) == budget


def test_a_block_counts_until_its_last_site_goes() -> None:
    costs = Budget("blocks", drop=1).costs(TABLE, SITES)
    assert [costs.of(Mask.from_key(key)) for key in ("1111", "0111", "0011", "0000")] == [
        2,
        2,
        1,
        0,
    ]


@pytest.mark.parametrize("ratio", [0.57, 0.29, 0.7, 2 / 3, 1 / 3, 0.55])
def test_a_ratio_of_equal_parts_is_not_lost_to_rounding(ratio: float) -> None:
    costs = SiteCosts(0, (3,) * 300)
    assert Budget("kv_bytes", ratio=ratio).cap_for(costs) == round(ratio * 900)


def test_a_ratio_is_otherwise_rounded_down() -> None:
    for total in (7, 999, 10**9 + 7, 3 * 10**15 + 1):
        costs = SiteCosts(0, (total,))
        assert Budget("params", ratio=0.5).cap_for(costs) == total // 2
        assert Budget("params", ratio=1.0).cap_for(costs) == total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "energy", "ratio": 0.5}, "unknown budget metric 'energy': expected one of"),
        ({"metric": "params"}, "exactly one of a ratio or an absolute cap"),
        ({"metric": "params", "ratio": 0.5, "cap": 9}, "exactly one of a ratio or an absolute cap"),
        ({"metric": "params", "drop": 3}, "exactly one of a ratio or an absolute cap"),
        ({"metric": "sites", "ratio": 0.5}, "a sites budget takes a drop count"),
        ({"metric": "blocks"}, "a blocks budget takes a drop count"),
        ({"metric": "params", "ratio": 0.0}, r"lies in \(0, 1\]: got 0.0"),
        ({"metric": "params", "ratio": 1.5}, r"lies in \(0, 1\]: got 1.5"),
        ({"metric": "params", "ratio": math.nan}, r"lies in \(0, 1\]: got nan"),
        ({"metric": "params", "cap": 0}, "is positive: got 0"),
        ({"metric": "sites", "drop": 0}, "at least 1: got 0"),
        ({"metric": "params", "ratio": 0.5, "of": "head"}, "not 'head'"),
    ],
)
def test_a_malformed_budget_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**arguments)  # type: ignore[arg-type]
