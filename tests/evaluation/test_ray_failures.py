"""What is killed around a search on Ray, and that nothing is lost: real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.tiny_runs import workplace_config, write_config

from depthsearch.journal import read_journal, without_times
from depthsearch.run.directory import BEST, JOURNAL
from depthsearch.run.search import search

pytestmark = pytest.mark.timeout(600)

SEARCH = {"method": "evolution", "max_evaluations": 60, "finalists": 2}
NODES = Path(__file__).parents[2] / "benchmarks" / "loopback_nodes.py"
PATIENCE_S = 300


@pytest.fixture(scope="module")
def undisturbed(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    search(workplace_config(workplace, search=SEARCH, cluster={"threads": 1}), out)
    return out


def result_of(run: Path) -> tuple[str, bytes]:
    return without_times(read_journal(run / JOURNAL)), (run / BEST).read_bytes()


def on_ray(workplace: Path, **cluster: object) -> Path:
    settings = {"backend": "ray", "threads": 1, **cluster}
    return write_config(workplace / "on-ray.yaml", search=SEARCH, cluster=settings)


@contextmanager
def started(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A depthsearch command in a process of its own, ended in any case."""
    process = subprocess.Popen(
        [sys.executable, "-m", "depthsearch.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def until(there: Callable[[], Any]) -> Any:
    """Wait until something is there and return it."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := there()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def records(run: Path) -> int:
    path = run / JOURNAL
    return len(read_journal(path)) if path.exists() else 0


def below(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if child.name().startswith(name)]


def ends_with_one_line(driver: subprocess.Popen[str], reason: str) -> None:
    _, said = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 2, said
    assert said.startswith(f"depthsearch: {reason}")
    assert said.count("\n") == 1


def test_nothing_is_lost_when_the_raylet_and_then_the_driver_are_killed(
    workplace: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = on_ray(workplace, workers=1, num_cpus=0.2)
    # An address in the environment is for those who join a cluster; this one starts its own.
    with started("search", config, "--out", out, RAY_ADDRESS="127.0.0.1:1") as driver:
        until(lambda: records(out) >= 4)
        (raylet,) = below(driver, "raylet")
        raylet.kill()
        ends_with_one_line(driver, "Ray's server on this machine (the raylet) has died")
    assert not (out / BEST).exists()

    before = records(out)
    with started("resume", out) as driver:
        until(lambda: below(driver, "ray::Worker"))
        if before < records(undisturbed) - 1:
            until(lambda: records(out) > before)
        driver.send_signal(signal.SIGKILL)
        driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == -signal.SIGKILL
    assert not (out / BEST).exists()

    with started("resume", out) as driver:
        _, said = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0, said
    assert result_of(out) == result_of(undisturbed)


def test_the_head_of_its_own_cluster_killed_ends_a_search_with_one_line(
    workplace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with started("search", on_ray(workplace, workers=1, num_cpus=0.2), "--out", out) as driver:
        until(lambda: records(out) >= 3)
        (gcs,) = below(driver, "gcs_server")
        gcs.kill()
        ends_with_one_line(driver, "the head of the Ray cluster (the GCS) has died")


def test_a_search_goes_on_when_all_nodes_are_gone_and_new_ones_come(
    workplace: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    nodes = subprocess.Popen(
        [sys.executable, NODES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with nodes:
        assert nodes.stdin is not None
        assert nodes.stdout is not None
        cluster = json.loads(nodes.stdout.readline())
        config = on_ray(workplace, address=cluster["address"])
        with started(
            "search", config, "--out", out, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"
        ) as driver:
            until(lambda: records(out) >= 3)
            for raylet in cluster["raylets"]:
                # Both, so that the search must wait for new ones.
                os.kill(raylet, signal.SIGKILL)
            new = 0
            deadline = time.monotonic() + PATIENCE_S
            while new < 2:
                assert time.monotonic() < deadline
                nodes.stdin.write("more\n")
                nodes.stdin.flush()
                new += int(nodes.stdout.readline())
            _, said = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode == 0, said
        nodes.stdin.close()
        nodes.wait(PATIENCE_S)
    assert result_of(out) == result_of(undisturbed)


STORE = """
import json, sys
import numpy as np
from depthsearch.evaluation.ray_environment import stay_local
stay_local()
import ray
from depthsearch.errors import ClusterError
from depthsearch.evaluation.ray_backend import RayCrew, RaySettings
from depthsearch.evaluation.worker import ModelSource
ray.init(
    num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False,
    object_store_memory=80_000_000, _system_config=json.loads(sys.argv[1]),
)
source = ModelSource("m", "float32", "cpu", None, False, 1)
weights = np.arange(30_000_000)
try:
    crew = RayCrew(RaySettings(workers=1), source, packed=weights)
    print(np.array_equal(ray.get(crew._packed), weights))
except ClusterError as error:
    print(error)
ray.shutdown()
"""


@pytest.mark.parametrize("disk", ["free", "full"])
def test_weights_larger_than_the_object_store_go_to_disk_or_end_with_advice(disk: str) -> None:
    # A disk is full for Ray above this share of it.
    config = {} if disk == "free" else {"local_fs_capacity_threshold": 1e-6}
    ended = subprocess.run(
        [sys.executable, "-c", STORE, json.dumps(config)],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    if disk == "free":
        assert ended.stdout == "True\n"
    else:
        assert "object_store_memory" in ended.stdout
        assert "cluster.weights=path" in ended.stdout
        assert ended.stdout.count("\n") == 1
