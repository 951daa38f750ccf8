"""The workers of a session: what a run file asks of a cluster, checked, and started when needed."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from depthsearch.config import ModelConfig, RunConfig, SearchConfig
from depthsearch.errors import ConfigError
from depthsearch.evaluation.ray_environment import spare_dumps, stay_local
from depthsearch.evaluation.turns import Repair
from depthsearch.model.load import LoadedModel
from depthsearch.searchers import needs_sensitivity
from depthsearch.sources import is_path

if TYPE_CHECKING:
    from depthsearch.calibration.tasks import Task
    from depthsearch.evaluation.ray_backend import Cluster
    from depthsearch.evaluation.worker import Text


class Workers:
    """The workers of a session, started when they are first needed, one set for all its runs."""

    def __init__(self) -> None:
        self.cluster: Cluster | None = None

    def start(self, config: RunConfig, loaded: LoadedModel) -> Cluster:
        """The workers, started now where they are not yet."""
        from depthsearch.evaluation.crew import Limits
        from depthsearch.evaluation.ray_backend import Cluster, RayCrew, RaySettings
        from depthsearch.evaluation.worker import ModelSource
        from depthsearch.model.packing import pack

        cluster, model = config.cluster, config.model
        if self.cluster is None:
            settings = RaySettings(
                cluster.address,
                cluster.workers,
                cluster.num_cpus,
                cluster.num_gpus,
                cluster.resources,
                Limits(cluster.unit_timeout_s, cluster.start_timeout_s, cluster.restarts),
            )
            local = is_path(model.path)
            source = ModelSource(
                str(Path(model.path).expanduser().absolute()) if local else model.path,
                str(loaded.dtype).removeprefix("torch."),
                _worker_devices(config, loaded),
                model.revision,
                model.trust_remote_code,
                torch.get_num_threads(),
                model.streamed,
                host_bytes(model),
            )
            packed = pack(loaded.model) if cluster.weights == "store" else None
            self.cluster = Cluster(RayCrew(settings, source, packed))
        return self.cluster

    def close(self) -> None:
        """End them; does nothing where there are none."""
        if self.cluster is not None:
            self.cluster.close()
        self.cluster = None


def worker_text(
    windows: Tensor,
    objective: str,
    mode: str,
    batch_tokens: int,
    positions: float,
    seed: int,
    *,
    repair: Repair = "none",
    fit: Tensor | None = None,
    task: Task | None = None,
    toward_text: float = 0.0,
) -> Text:
    """A text as workers take it, under a name that no other text of the session has."""
    from depthsearch.evaluation.worker import Text

    digest = hashlib.sha256(str(tuple(windows.shape)).encode() + windows.numpy().tobytes())
    if repair != "none" and fit is not None:
        leaning = f"{toward_text:g}" if toward_text else ""
        digest.update((repair + leaning).encode() + fit.numpy().tobytes())
    if task is not None:
        digest.update(task.fingerprint.encode())
    return Text(
        name=f"{digest.hexdigest()[:16]}-{seed}-{objective}-{positions:g}",
        windows=windows.numpy(),
        objective=objective,
        mode=mode,
        batch_tokens=batch_tokens,
        positions=positions,
        seed=seed,
        fit=None if fit is None or repair == "none" else fit.numpy(),
        repair=repair,
        task=task,
        toward_text=toward_text,
    )


def computing_device(config: RunConfig, loaded: LoadedModel) -> str:
    """Where losses are computed: the kind, since the number of GPUs changes none."""
    on_gpu = config.cluster.backend == "ray" and config.cluster.num_gpus > 0
    return "cuda" if on_gpu else str(loaded.device)


def host_bytes(model: ModelConfig) -> int | None:
    """Memory for the hidden states of a streamed model, None for as much as it takes."""
    return None if model.host_gb is None else int(model.host_gb * 10**9)


def threads_of(config: RunConfig) -> int | None:
    """Threads of whoever computes, None for torch's choice; the driver uses as many."""
    cluster = config.cluster
    if cluster.threads is None and cluster.backend == "ray":
        return max(1, int(cluster.num_cpus))
    return cluster.threads


def check_cluster(config: RunConfig) -> None:
    """Refuse what no worker could do, before anything slow starts; raises ConfigError."""
    if config.cluster.backend == "ray" and find_spec("ray") is None:
        raise ConfigError(
            "cluster.backend is ray, which is not installed: pip install 'depthsearch[ray]', or "
            "set cluster.backend=in-process"
        )
    if config.cluster.backend == "ray":
        spare_dumps()
        if config.cluster.address is None:
            stay_local()
    if config.model.streamed:
        _check_streamed(config)


def check_repair(config: RunConfig, search: SearchConfig) -> None:
    """Refuse repairs where weights can't be changed; raises ConfigError."""
    if config.model.streamed and {search.repair, search.finished} != {"none"}:
        raise ConfigError(
            "model.streamed can't refit weights: set search.repair and search.finish to none"
        )
    if search.toward_text and search.finished == "none":
        raise ConfigError(
            f"search.toward_text is {search.toward_text:g}, but nothing is repaired in the end: "
            "set search.finish to gap or sequential, or search.toward_text to 0"
        )


def check_gradients(config: RunConfig, search: SearchConfig) -> None:
    """Refuse methods that need gradients where there are none; raises ConfigError."""
    if config.model.streamed and needs_sensitivity(search.method):
        raise ConfigError(
            f"search.method is {search.method}, which needs gradients through the whole model, but "
            "model.streamed holds one block at a time: choose another method, or set "
            "model.streamed to false"
        )


def _check_streamed(config: RunConfig) -> None:
    model, cluster = config.model, config.cluster
    if model.trust_remote_code:
        raise ConfigError("model.streamed can't run a model's own code: leave one of them out")
    if "," in model.device or (cluster.backend == "ray" and cluster.num_gpus > 1):
        raise ConfigError(
            "model.streamed brings blocks to one device: give model.device one, or set "
            "cluster.num_gpus to 1 and start more workers"
        )
    if cluster.backend == "ray" and cluster.weights == "store":
        raise ConfigError(
            "cluster.weights is store, but with model.streamed workers read the weights from the "
            "checkpoint: leave one of them out"
        )


def _worker_devices(config: RunConfig, loaded: LoadedModel) -> str:
    """The devices of one worker; it sees no other GPUs than its own, which count from 0."""
    gpus = int(config.cluster.num_gpus)
    if gpus <= 1:
        return computing_device(config, loaded)
    return ",".join(f"cuda:{index}" for index in range(gpus))
