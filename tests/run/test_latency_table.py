from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.latency_tables import table_data, write_table
from tests.tiny_models import save_tiny

from depthsearch.errors import BudgetError, InputError, ModelError
from depthsearch.model.load import load_model
from depthsearch.run.latency_table import Latency, LatencyTable, read_latency
from depthsearch.space import Budget, CostTable, Mask, SearchSpace, Site, SiteCosts

SITES = tuple(
    Site(2 * block + place, "decoder", block, kind)
    for block in range(4)
    for place, kind in enumerate(("attention", "ffn"))
)  # type: ignore[misc]
PLAIN = CostTable({"params": SiteCosts(10, (1,) * 8)})


def parsed(data: dict[str, Any]) -> LatencyTable:
    return LatencyTable.model_validate_json(json.dumps(data))


def read(path: Path, data: dict[str, Any]) -> Latency:
    path.write_text(json.dumps(data))
    found = read_latency(path)
    assert found is not None
    return found


def space(budget: Budget, **settings: Any) -> SearchSpace:
    costs = Latency(parsed(table_data()), "t.json", "").added(PLAIN, SITES, 64)
    return SearchSpace(SITES, costs, budget, **settings)


def test_costs_are_what_the_table_says() -> None:
    costs = parsed(table_data()).costs(SITES)
    assert costs == SiteCosts(2_000_000, (1_000_000, 3_000_000) * 4)
    assert costs.of(Mask.from_key("01101111")) == 13_000_000 + 1_000_000
    added = Latency(parsed(table_data()), "t.json", "").added(PLAIN, SITES, 64)
    assert list(added.metrics) == ["params", "latency"]
    assert added.total("latency") == 18_000_000
    assert added.total("params") == 18


def test_what_sites_share_is_paid_while_one_of_them_is_kept() -> None:
    data = table_data()
    data["shared"] = [{"names": ["decoder.1.attention", "decoder.1.ffn"], "ns": 500}]
    costs = parsed(data).costs(SITES)
    assert costs.shared == (((2, 3), 500),)
    keys = ("11111111", "11011111", "11001111")
    assert [costs.of(Mask.from_key(key)) for key in keys] == [18_000_500, 17_000_500, 14_000_000]
    assert parsed(data).sum_ns == 18_000_500


@pytest.mark.parametrize(
    ("budget", "cap"),
    [
        (Budget("latency", ratio=0.75), 13_500_000),
        (Budget("latency", ratio=0.5, of="blocks"), 10_000_000),
        (Budget("latency", cap=12_000_000), 12_000_000),
    ],
)
@pytest.mark.parametrize("packable", [False, True])
def test_masks_on_budget_are_those_that_no_sublayer_can_return_to(
    budget: Budget, cap: int, packable: bool
) -> None:
    here = space(budget, packable=packable)
    assert here.cap == cap

    def cost(keep: tuple[bool, ...]) -> int:
        return 2_000_000 + sum(3_000_000 if i % 2 else 1_000_000 for i in range(8) if keep[i])

    def allowed(keep: tuple[bool, ...]) -> bool:
        runs = [len(list(run)) for kept, run in itertools.groupby(keep) if not kept]
        return cost(keep) <= cap and not (packable and any(length % 2 for length in runs))

    every = [keep for keep in itertools.product((True, False), repeat=8) if allowed(keep)]
    steps = 2 if packable else 1
    expected = {
        keep
        for keep in every
        if not any(
            sum(other) == sum(keep) + steps
            and all(a >= b for a, b in zip(other, keep, strict=True))
            for other in every
        )
    }
    found = here.enumerate()
    assert found is not None
    assert {mask.keep for mask in found} == expected


def test_the_cheapest_reachable_step_is_named_in_milliseconds() -> None:
    message = (
        r"latency at most 2\.5 ms allows 2\.5 ms, but the cheapest mask of this space costs "
        r"5 ms \(27\.8 % of the dense model's 18 ms\)"
    )
    with pytest.raises(BudgetError, match=message):
        space(Budget("latency", cap=2_500_000), protected=frozenset({1}))


def test_the_sum_is_compared_with_the_step_measured_whole() -> None:
    data = table_data()
    assert parsed(data).additivity_error == 0
    data["whole"]["ns"] = 20_000_000
    assert parsed(data).additivity_error == pytest.approx(-0.1)
    assert parsed(data).warnings == []
    data["interrupted"] = 0.4
    assert "interrupted 40 % of the steps" in parsed(data).warnings[0]


def test_the_file_is_known_by_its_sha256(tmp_path: Path) -> None:
    found = read(tmp_path / "table.json", table_data())
    assert found.name == "table.json"
    assert found.signature == {
        "sha256": hashlib.sha256((tmp_path / "table.json").read_bytes()).hexdigest(),
        "device_name": "a machine elsewhere",
        "dtype": "float32",
        "threads": 1,
        "context_tokens": 64,
    }
    assert read_latency(None) is None


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "/" + "n" * 300])
def test_paths_that_cant_be_looked_at(path: str) -> None:
    with pytest.raises(InputError, match=r"can't be read: (Could not determine|File name too)"):
        read_latency(path)


def test_the_table_of_another_model_is_refused(tmp_path: Path) -> None:
    loaded = load_model(str(save_tiny(tmp_path / "model", "llama")), "float32", "cpu")
    read_latency(write_table(tmp_path / "own.json", tmp_path / "model")).check(loaded)  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"t\.json has the times of another model, model \(its fi"):
        read(tmp_path / "t.json", table_data()).check(loaded)


def test_another_context_is_refused(tmp_path: Path) -> None:
    table = read(tmp_path / "t.json", table_data())
    with pytest.raises(BudgetError, match=r"behind a context of 64 tokens, but .* is 128: set it"):
        table.added(PLAIN, SITES, 128)


@pytest.mark.parametrize("sites", [SITES[:6], (*SITES[1:], SITES[0])])
def test_other_sites_are_refused(sites: tuple[Site, ...]) -> None:
    with pytest.raises(ModelError, match=rf"lists 8 sites, which are not the model's {len(sites)}"):
        parsed(table_data()).costs(sites)


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("sites"), "sites: Field required"),
        (without("signature"), "signature: Field required"),
        (lambda data: data.update(latency_table=2), "latency_table: Input should be 1"),
        (lambda data: data.update(sites=[]), "sites: "),
        (
            lambda data: data["sites"][3].update(ns=-1),
            r"sites\.3\.ns: .* greater than or equal",
        ),
        (lambda data: data["sites"][3].update(ns="1 ms"), r"sites\.3\.ns: "),
        (lambda data: data["fixed"].update(extra=1), r"fixed\.extra: "),
        (lambda data: data["whole"].update(ns=0), "its step takes no time"),
    ],
)
def test_what_is_no_table_is_refused(
    damage: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    data = table_data()
    damage(data)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "t.json", data)
    assert "write one with `depthsearch latency MODEL --out FILE`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such latency table; write one with"):
        read_latency(tmp_path / "missing.json")
    with pytest.raises(InputError, match="can't be read"):
        read_latency(tmp_path)
    (tmp_path / "text").write_bytes(b"\xff\x00 no JSON")
    with pytest.raises(InputError, match="is no latency table"):
        read_latency(tmp_path / "text")
