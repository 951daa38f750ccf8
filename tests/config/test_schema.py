from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from depthsearch.config import BudgetConfig, config_from_mapping, resolved_yaml
from depthsearch.config.budgets import parse_amount
from depthsearch.config.schema import ClusterConfig, ModelConfig
from depthsearch.config.searches import RacingConfig
from depthsearch.errors import ConfigError
from depthsearch.space import Budget

SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "metric", "amount"),
    [
        ("100M", "params", 100_000_000),
        ("1.5b", "params", 1_500_000_000),
        ("250 k", "params", 250_000),
        ("180MB", "bytes", 180_000_000),
        ("200MiB", "bytes", 200 * 1024**2),
        ("1GiB", "bytes", 1024**3),
        ("512B", "kv_bytes", 512),
        ("12kB", "kv_bytes", 12_000),
        ("3.5GFLOP", "flops", 3_500_000_000),
        ("2e2 MFLOPs", "flops", 200_000_000),
        ("12ms", "latency", 12_000_000),
        ("0.25 s", "latency", 250_000_000),
        ("850us", "latency", 850_000),
        ("40 NS", "latency", 40),
    ],
)
def test_caps_with_units(text: str, metric: str, amount: int) -> None:
    assert parse_amount(text, metric) == amount


@pytest.mark.parametrize(
    ("text", "metric"),
    [
        ("100", "params"),
        ("100MB", "params"),
        ("180M", "bytes"),
        ("3GB", "flops"),
        ("-1M", "params"),
        (f"{10**400}M", "params"),
        ("M", "params"),
        ("", "bytes"),
        ("0.1B", "bytes"),
        ("1 2 MB", "bytes"),
        ("12", "latency"),
        ("12m", "latency"),
        ("0.5ns", "latency"),
    ],
)
def test_caps_that_mean_nothing(text: str, metric: str) -> None:
    with pytest.raises(ValueError, match="a cap is"):
        parse_amount(text, metric)


@pytest.mark.parametrize(
    ("config", "budget"),
    [
        (BudgetConfig(keep_params=0.75, of="blocks"), Budget("params", ratio=0.75, of="blocks")),
        (BudgetConfig(keep_params=1), Budget("params", ratio=1.0)),
        (BudgetConfig(keep_bytes="180MB"), Budget("bytes", cap=180_000_000)),
        (BudgetConfig(keep_flops="0.2GFLOP"), Budget("flops", cap=200_000_000)),
        (BudgetConfig(keep_kv_bytes=0.6), Budget("kv_bytes", ratio=0.6)),
        (BudgetConfig(keep_latency=0.75, of="blocks"), Budget("latency", ratio=0.75, of="blocks")),
        (BudgetConfig(keep_latency="12.5 ms"), Budget("latency", cap=12_500_000)),
        (BudgetConfig(drop_sites=14), Budget("sites", drop=14)),
        (BudgetConfig(drop_blocks=7), Budget("blocks", drop=7)),
    ],
)
def test_every_budget_is_one_the_space_understands(config: BudgetConfig, budget: Budget) -> None:
    assert Budget.from_json(config.to_budget_json()) == budget


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_shipped_search_space_loads(path: Path) -> None:
    config = config_from_mapping(
        {"model": {"path": "m"}, "space": str(path), "calibration": {"text": "t"}}
    )
    Budget.from_json(config.space.budget.to_budget_json())


def test_the_shipped_search_spaces_are_the_four_documented() -> None:
    assert [path.stem for path in SPACES] == ["attention-only", "blocks", "packable", "sublayers"]


@pytest.mark.parametrize("gpus", [0, 0.25, 1, 2, 8])
def test_a_worker_has_a_share_of_a_gpu_or_whole_ones(gpus: float) -> None:
    assert ClusterConfig(num_gpus=gpus).num_gpus == gpus
    with pytest.raises(ValueError, match="a share of one GPU"):
        ClusterConfig(num_gpus=gpus + 1.5)


@pytest.mark.parametrize("device", ["cuda:0,cuda:1", "cuda:0,cuda:1,cuda:12", "cuda:3", "auto"])
def test_a_model_has_one_device_or_several_gpus(device: str) -> None:
    assert ModelConfig(path="m", device=device).device == device
    with pytest.raises(ValueError, match="pattern"):
        ModelConfig(path="m", device=f"{device},cpu")


class TestRacing:
    def race(self, value: object) -> RacingConfig:
        config = config_from_mapping(
            {
                "model": {"path": "m"},
                "space": {"budget": {"drop_sites": 1}},
                "calibration": {"text": "t"},
                "search": {"racing": value},
            }
        )
        again = config_from_mapping(yaml.safe_load(resolved_yaml(config)))
        assert again == config
        return config.search.racing

    @pytest.mark.parametrize(
        ("value", "race"),
        [
            (True, RacingConfig(method="paired", error_rate=0.05)),
            (False, RacingConfig(method="none")),
            ({}, RacingConfig()),
            ({"error_rate": 0.2}, RacingConfig(method="paired", error_rate=0.2)),
            ({"method": "halving", "eta": 4}, RacingConfig(method="halving", eta=4)),
        ],
    )
    def test_a_switch_or_a_mapping(self, value: object, race: RacingConfig) -> None:
        assert self.race(value) == race
        assert bool(race) == (race.method != "none")

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (0.05, r"search\.racing is 0\.05; must be true, false, or a mapping such as {method"),
            ("halving", r"search\.racing is 'halving'; must be true, false, or a mapping"),
            ({"method": "halfing"}, r"search\.racing\.method .* did you mean 'halving'\?"),
            ({"error_rate": 0}, r"search\.racing\.error_rate is 0; must be greater than 0"),
            ({"error_rate": 1.0}, r"search\.racing\.error_rate is 1\.0; must be less than 1"),
            ({"eta": 1}, r"search\.racing\.eta is 1; must be greater than or equal to 2"),
            ({"eror_rate": 0.1}, r"unknown key 'search\.racing\.eror_rate'; did you mean"),
        ],
    )
    def test_what_is_wrong_is_said(self, value: object, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            self.race(value)
