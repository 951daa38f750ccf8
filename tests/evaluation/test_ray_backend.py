"""A real Ray cluster on this machine, with real workers that really die."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import torch
from tests.tiny_models import MODEL_TYPES, tiny_model
from tests.tiny_runs import workplace_config

from depthsearch.calibration.objectives import KLDivergence
from depthsearch.config import RunConfig
from depthsearch.errors import ClusterError
from depthsearch.evaluation import InProcess
from depthsearch.evaluation.crew import Limits
from depthsearch.evaluation.ray_backend import Cluster, RayBackend, RayCrew, RaySettings
from depthsearch.evaluation.worker import Computed, ModelSource, Text, Worker
from depthsearch.journal import read_journal, without_times
from depthsearch.model.packing import pack, unpack
from depthsearch.run.calibration_check import check_calibration
from depthsearch.run.calibration_texts import CheckOptions
from depthsearch.run.directory import BEST, FRONT, JOURNAL
from depthsearch.run.front import with_front
from depthsearch.run.search import search
from depthsearch.run.session import Session, opened
from depthsearch.searchers import SEARCHERS
from depthsearch.space import Mask, Status

pytestmark = pytest.mark.timeout(900)

REPAIRED = "evolution on repaired masks"
TABLED = "evolution on masks with repairs looked up"
SCORED = "evolution by the angle of logits"
PAIRS = {"front over pairs": "front", "optuna over pairs": "optuna"}


@pytest.fixture(scope="module")
def cluster_of_one(workplace: Path) -> Iterator[Session]:
    """A session with a local Ray cluster that has room for 10 workers, which starts with one."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    session = Session.open(on_ray(workplace, weights="store"))
    yield session
    session.close()
    ray.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def on_ray(workplace: Path, method: str = "evolution", **cluster: object) -> RunConfig:
    settings: dict[str, object] = {"method": method, "max_evaluations": 20, "finalists": 2}
    if method == "beam":
        # Its masks meet the budget only in its last steps.
        settings["max_evaluations"] = 60
    if method == REPAIRED:
        settings |= {"method": "evolution", "repair": "gap", "finish": "sequential"}
    if method == TABLED:
        settings |= {"method": "evolution", "repair": "table"}
    if method == SCORED:
        # On the same text as the others, whose losses it must not be given.
        settings |= {"method": "evolution", "score": "angular"}
    sections: dict[str, object] = {}
    if method in PAIRS:
        settings |= {"method": PAIRS[method], "max_evaluations": 40}
        if PAIRS[method] == "optuna":
            settings["options"] = {"sampler": "nsga2"}
        sections["front"] = {
            "budgets": [{"keep_params": 0.85}],
            "second": [{"keep_kv_bytes": 0.75}, {"keep_kv_bytes": 0.5}],
        }
    return workplace_config(
        workplace,
        **sections,
        search=settings,
        calibration={"fit_tokens": 128, "finals_fit_tokens": 256},
        cluster={"backend": "ray", "workers": 1, "num_cpus": 0.2, "threads": 1, **cluster},
    )


def result_of(run: Path) -> tuple[str, ...]:
    written = [(run / name).read_text() for name in (BEST, FRONT) if (run / name).is_file()]
    return without_times(read_journal(run / JOURNAL)), *written


def crew_of(session: Session) -> RayCrew:
    assert session.workers.cluster is not None
    return session.workers.cluster.crew


@pytest.fixture(scope="module")
def undisturbed(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every method's run in this process."""
    runs = {}
    for method in (*SEARCHERS, REPAIRED, TABLED, SCORED, *PAIRS):
        config = on_ray(workplace, method)
        config = config.model_copy(
            update={"cluster": config.cluster.model_copy(update={"backend": "in-process"})}
        )
        runs[method] = tmp_path_factory.mktemp("undisturbed") / method
        search(config, runs[method])
    return runs


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_journal_and_best_mask_are_those_of_one_process(
    cluster_of_one: Session,
    undisturbed: dict[str, Path],
    workplace: Path,
    tmp_path: Path,
    workers: int,
) -> None:
    for method, reference in undisturbed.items():
        config = on_ray(workplace, method)
        space = with_front(cluster_of_one.space, config.front)
        session = replace(cluster_of_one, config=config, space=space)
        if session.workers.cluster is not None:
            crew_of(session).grow(workers)
            until_joined(session, workers)
        search(session.config, tmp_path / method, session=session)
        assert result_of(tmp_path / method) == result_of(reference)
    assert session.workers.cluster is not None
    state = session.workers.cluster.dispatcher.state()
    assert len(state["workers"]) == workers
    assert not state["quarantined"]


def until_joined(session: Session, workers: int) -> None:
    """Evaluate something until that many workers take part."""
    assert session.workers.cluster is not None
    dispatcher = session.workers.cluster.dispatcher
    deadline = time.monotonic() + 600
    backend = session.backend(session.splits(0).select, 0)
    while dispatcher.ready < workers:
        assert time.monotonic() < deadline
        backend.run(0, [session.space.dense])


def test_workers_killed_while_they_compute_change_nothing(
    cluster_of_one: Session, undisturbed: dict[str, Path], workplace: Path, tmp_path: Path
) -> None:
    session = replace(cluster_of_one, config=on_ray(workplace))
    session.backend(session.splits(0).select, 0)
    crew, killed = crew_of(session), []
    crew.grow(2)
    until_joined(session, 2)
    ended = threading.Event()

    def murder() -> None:
        while not ended.wait(0.05) and len(killed) < 2:
            for about in list(crew.about.values())[:1]:
                if about["pid"] not in killed and psutil.pid_exists(about["pid"]):
                    os.kill(about["pid"], signal.SIGKILL)
                    killed.append(about["pid"])

    murderer = threading.Thread(target=murder)
    murderer.start()
    try:
        search(session.config, tmp_path / "run", session=session)
    finally:
        ended.set()
        murderer.join()
    assert killed
    assert result_of(tmp_path / "run") == result_of(undisturbed["evolution"])


def test_a_cluster_of_its_own_listens_on_this_machine_only() -> None:
    script = """
import psutil
from depthsearch.evaluation.ray_environment import stay_local
stay_local()
from depthsearch.evaluation.ray_backend import RayCrew, RaySettings
from depthsearch.evaluation.worker import ModelSource
crew = RayCrew(RaySettings(workers=1), ModelSource("m", "float32", "cpu", None, False, 1))
own = [psutil.Process(), *psutil.Process().children(recursive=True)]
ports = [c.laddr for p in own for c in p.net_connections("tcp") if c.status == "LISTEN"]
print(sorted({address.ip for address in ports}))
crew.close()
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "['127.0.0.1', '::ffff:127.0.0.1']"


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_stream_the_weights_write_the_same_journal(
    cluster_of_one: Session,
    undisturbed: dict[str, Path],
    workplace: Path,
    tmp_path: Path,
    workers: int,
) -> None:
    """As one process with the whole model does, and as one that streams it: see `test_search`."""
    config = on_ray(workplace, workers=workers)
    model = config.model.model_copy(update={"streamed": True, "host_gb": 0.001})
    config = config.model_copy(update={"model": model})
    with opened(config, None) as session:
        search(config, tmp_path / "run", session=session)
        assert session.workers.cluster is not None
        state = session.workers.cluster.dispatcher.state()
    assert result_of(tmp_path / "run") == result_of(undisturbed["evolution"])
    assert len(state["workers"]) == workers
    asks = (tmp_path / "run" / JOURNAL).read_text().count('"op":"ask"')
    # A unit is a pass of a worker over the weights; the finals are one more set of masks.
    assert asks + 1 <= state["units_done"] <= workers * (asks + 1)


class Fragile(Worker):
    """Dies of masks that drop the first site, and refuses those that drop the last."""

    def run(self, text: Text, batch: int, keys: Sequence[str]) -> Computed:
        if any(key.startswith("0") for key in keys):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(key.endswith("0") for key in keys):
            return Computed(error="RuntimeError: no such luck")
        return super().run(text, batch, keys)


def test_masks_that_kill_or_fail_are_given_up_and_the_others_computed(
    cluster_of_one: Session, workplace: Path
) -> None:
    session = cluster_of_one
    model = session.config.model.path
    source = ModelSource(str(Path(model).absolute()), "float32", "cpu", None, False, 1)
    text = Text(
        "fragile", session.splits(0).select.numpy(), "kl", str(session.check.mode), 64, 0.25, 0
    )
    sites = len(session.space.sites)
    masks = [Mask.dropping(sites, [n]) for n in range(sites)]
    planner = InProcess(
        session.loaded.model,
        session.anatomy,
        session.splits(0).select,
        KLDivergence(),
        mode=session.check.mode,
        batch_tokens=64,
    )
    settings = RaySettings(workers=2, num_cpus=0.2, limits=Limits(restarts=8))
    with Cluster(RayCrew(settings, source, worker=Fragile)) as cluster:
        found = RayBackend(cluster, planner, text).run(0, masks)
        assert set(cluster.dispatcher.quarantined) == {masks[0], masks[-1]}
        assert "no such luck" in cluster.dispatcher.quarantined[masks[-1]]
    right = planner.run(0, masks)
    assert found.losses[1:-1] == right.losses[1:-1]
    assert found.statuses[0] == found.statuses[-1] == Status.FAILED
    assert found.cost_tokens == right.cost_tokens


def test_workers_that_cannot_load_the_model_end_the_run_with_one_line(
    cluster_of_one: Session, tmp_path: Path
) -> None:
    source = ModelSource(str(tmp_path / "nowhere"), "float32", "cpu", None, False, 1)
    settings = RaySettings(workers=1, num_cpus=0.2, limits=Limits(restarts=1))
    text = Text("t", cluster_of_one.splits(0).select.numpy(), "kl", "site", 64, 0.25, 0)
    with Cluster(RayCrew(settings, source)) as cluster:
        cluster.crew.add_text(text)
        with pytest.raises(ClusterError, match="2 times in a row") as caught:
            cluster.dispatcher.compute("t", 0, [cluster_of_one.space.dense], sure=True)
    assert "nowhere" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_packed_model_computes_the_same_from_the_same_memory(
    family: str, dtype: torch.dtype
) -> None:
    model = tiny_model(family, 3, dtype)
    packed = pack(model)
    for array in packed.arrays:
        array.flags.writeable = False
    again = unpack(packed)
    tied = [
        m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, again)
    ]
    assert tied[0] == tied[1]
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in again.state_dict().values()} == own


def test_a_calibration_check_on_workers_has_the_figures_of_one_process(
    cluster_of_one: Session, tmp_path: Path
) -> None:
    """The same tokens in windows of another length are another text to the workers."""
    alone = cluster_of_one.config.cluster.model_copy(update={"backend": "in-process"})
    options = CheckOptions(masks=4, draws=2, lengths=(32,))
    found = {}
    for cluster in (cluster_of_one.config.cluster, alone):
        config = cluster_of_one.config.model_copy(update={"cluster": cluster})
        session = replace(cluster_of_one, config=config)
        out = tmp_path / cluster.backend
        found[cluster.backend] = check_calibration(config, out, options, session=session)
    assert found["ray"] == found["in-process"]
