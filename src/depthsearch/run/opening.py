"""The configured model, opened whole or without its weights, where a run computes."""

from __future__ import annotations

from depthsearch.config import RunConfig
from depthsearch.model.load import (
    LoadedModel,
    checkpoint_folder,
    fingerprint,
    load_model,
    load_tokenizer,
)
from depthsearch.model.streaming import StreamedModel
from depthsearch.sources import is_path


def open_model(config: RunConfig) -> LoadedModel:
    """Load the configured model."""
    model = config.model
    return load_model(model.path, *_here(config), model.revision, model.trust_remote_code)


def open_streamed(config: RunConfig) -> tuple[LoadedModel, StreamedModel]:
    """The configured model without its weights, and what brings them block by block."""
    model = config.model
    folder = checkpoint_folder(model.path, model.revision)
    streamed = StreamedModel.open(folder, *_here(config))
    return (
        LoadedModel(
            streamed.model,
            load_tokenizer(model.path, folder, False, {}),
            model.path,
            None if is_path(model.path) else folder.name,
            fingerprint(folder),
            streamed.dtype,
            streamed.device,
            folder,
        ),
        streamed,
    )


def _here(config: RunConfig) -> tuple[str, str]:
    """The dtype, which is the workers' as well, and the device of this process."""
    model, cluster = config.model, config.cluster
    if cluster.backend != "ray":
        return model.dtype, model.device
    # The workers have the accelerators; the driver counts costs and computes hints.
    on_gpu = cluster.num_gpus > 0 and model.dtype == "auto"
    return "bfloat16" if on_gpu else model.dtype, "cpu"
