"""The metrics of a search on a real Ray cluster, scraped as Prometheus does."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.tiny_runs import write_config

from depthsearch.evaluation.ray_metrics import Metrics
from depthsearch.run.directory import BEST

pytestmark = pytest.mark.timeout(600)

SEARCH = """
import json, re, sys, time, urllib.request
from contextlib import suppress
from pathlib import Path
from depthsearch.evaluation.ray_environment import stay_local
stay_local()
import psutil, ray
from depthsearch.config import load_config
from depthsearch.run.directory import WORKERS
from depthsearch.run.search import search

config, out = load_config(Path(sys.argv[1])), Path(sys.argv[2])
search(config, out / "alone")

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         _node_ip_address="127.0.0.1")
on_ray = config.model_copy(update={"cluster": config.cluster.model_copy(update={"backend": "ray"})})
search(on_ray, out / "watched")
state = json.loads((out / "watched" / WORKERS).read_text())

port, found = ray.nodes()[0]["MetricsExportPort"], {}
own = [psutil.Process(), *psutil.Process().children(recursive=True)]
ports = []
for process in own:
    with suppress(psutil.NoSuchProcess):
        ports += [c.laddr for c in process.net_connections("tcp") if c.status == "LISTEN"]
until = time.monotonic() + float(sys.argv[3])
names = ["evaluations", "cost_tokens", "best_loss", "units_done_total", "quarantined_masks"]
names += [f"workers watched {state}" for state in ("starting", "ready", "busy")]
wanted = {name if " " in name else f"{name} watched" for name in names}
while time.monotonic() < until and not found.keys() >= wanted:
    try:
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        page = ""
    for name, tags, value in re.findall(r"^ray_depthsearch_(\\w+)\\{(.*)\\} (\\S+)$", page, re.M):
        named = dict(re.findall(r'(\\w+)="([^"]*)"', tags))
        found[" ".join([name, named["run"], *([named["state"]] if "state" in named else [])])] = (
            float(value))
    time.sleep(0.5)
ray.shutdown()
print(json.dumps({"found": found, "listens": sorted({p.ip for p in ports}), "state": state}))
"""


def searched(folder: Path, out: Path, patience_s: float) -> dict[str, Any]:
    """A run in this process and the same one on Ray workers, and what was scraped."""
    cluster = {"workers": 2, "num_cpus": 0.2, "threads": 1}
    config = write_config(
        folder / "metrics.yaml",
        search={"method": "random", "max_evaluations": 12, "finalists": 2},
        cluster=cluster,
    )
    ended = subprocess.run(
        [sys.executable, "-c", SEARCH, str(config), str(out), str(patience_s)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    figures: dict[str, Any] = yaml.safe_load(ended.stdout.splitlines()[-1])
    assert (out / "alone" / BEST).read_bytes() == (out / "watched" / BEST).read_bytes()
    return figures


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("aiohttp", "opencensus", "prometheus_client")),
    reason="Ray exports metrics only with what ray[default] brings",
)
def test_prometheus_finds_where_a_search_stands(workplace: Path, tmp_path: Path) -> None:
    figures = searched(workplace, tmp_path, 60)
    found, state = figures["found"], figures["state"]
    best = yaml.safe_load((tmp_path / "watched" / BEST).read_text())
    assert found["evaluations watched"] == best["evaluations"] == 12
    assert found["cost_tokens watched"] == pytest.approx(best["cost_tokens"])
    assert found["best_loss watched"] <= best["loss"]
    assert sum(found[f"workers watched {name}"] for name in ("starting", "ready", "busy")) == 2
    assert found["units_done_total watched"] >= state["units_done"] > 0
    assert found["quarantined_masks watched"] == 0
    assert not any(key.split()[1] == "alone" for key in found)
    assert {address.removeprefix("::ffff:") for address in figures["listens"]} == {"127.0.0.1"}


@pytest.mark.skipif(
    find_spec("prometheus_client") is not None, reason="what plain Ray lacks is installed"
)
def test_plain_ray_exports_nothing_and_nothing_depends_on_it(
    workplace: Path, tmp_path: Path
) -> None:
    figures = searched(workplace, tmp_path, 1)
    assert figures["found"] == {}
    assert {address.removeprefix("::ffff:") for address in figures["listens"]} == {"127.0.0.1"}


def test_metrics_that_fail_warn_once_and_raise_nothing(caplog: pytest.LogCaptureFixture) -> None:
    name: Any = 7  # Ray takes words only.
    metrics = Metrics(name)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            metrics.tell_progress(1, 2.0, None)
            metrics.tell_state({"workers": [], "quarantined": []})
    assert len(caplog.records) == 1
    assert "goes on without them" in caplog.text
