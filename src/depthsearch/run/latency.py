"""Measure a latency table, and what a search that counted in one came to."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from depthsearch import __version__
from depthsearch.config.section import MOST_THREADS
from depthsearch.errors import InputError, StorageError
from depthsearch.model.anatomy import describe, require_decoder_only
from depthsearch.model.load import LoadedModel, load_model
from depthsearch.quality import StepTimes, Times, measure_parts, measure_steps
from depthsearch.run.directory import occupied, write_json
from depthsearch.run.latency_table import (
    Latency,
    LatencyTable,
    Measured,
    ModelName,
    SharedTime,
    SiteTime,
    TableSignature,
)
from depthsearch.sources import is_path
from depthsearch.space import Mask, Site

OnStage = Callable[[str, int, int], None]


def write_latency(
    source: str,
    out: Path,
    *,
    context_tokens: int = 2048,
    repeats: int = 50,
    threads: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    on_stage: OnStage | None = None,
) -> dict[str, Any]:
    """Measure a model on this machine and write its latency table to `out`.

    `threads` are processor threads, torch's own choice where left out. Returns what the file holds,
    with `sum_ns` and `additivity_error`. Raises InputError, before anything slow where `out`
    exists, and StorageError.
    """
    if occupied(out):
        raise InputError(f"{out} exists already and is never overwritten: choose another --out")
    # Found out now rather than when all is measured; a folder is only made for a finished table.
    there = next(folder for folder in out.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise StorageError(f"cannot write into {there}: choose another --out")
    with torch_threads(threads):
        loaded = load_model(source, dtype, device, revision)
        require_decoder_only(loaded.model, "depthsearch latency")
        anatomy = describe(loaded.model)
        times = measure_parts(
            loaded.model,
            anatomy,
            context_tokens,
            repeats,
            lambda done, total: on_stage("latency", done, total) if on_stage else None,
        )
        signature = _signature(loaded, anatomy.model_class, context_tokens, repeats)
    table = LatencyTable(
        latency_table=1,
        signature=signature,
        sites=tuple(_site_times(anatomy.sites, times)),
        shared=tuple(
            SharedTime(names=tuple(site.name for site in anatomy.sites_of(block)), ns=ns)
            for block, ns in enumerate(times.shared_costs)
        ),
        fixed=_measured(times.fixed),
        whole=_measured(times.whole),
        interrupted=times.interrupted,
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {out.parent}: {error.strerror or error}") from error
    data = table.model_dump(mode="json")
    write_json(out, data)
    return data | {
        "sum_ns": table.sum_ns,
        "additivity_error": table.additivity_error,
        "warnings": table.warnings,
    }


def beside_prediction(
    latency: Latency,
    sites: Sequence[Site],
    mask: Mask,
    models: Mapping[str, Any],
    repeats: int,
    on_stage: OnStage | None = None,
) -> dict[str, Any]:
    """The decoding step of the dense and the pruned model, in turns, beside the table's prediction.

    `models` holds them as "dense" and "pruned". Milliseconds behind the table's context, with its
    number of threads, on this machine; ratios are pruned over dense. Raises ModelError.
    """
    table, costs = latency.table, latency.table.costs(sites)
    with torch_threads(table.signature.threads):
        steps = measure_steps(
            models,
            table.signature.context_tokens,
            repeats,
            lambda done, total: on_stage("decoding steps", done, total) if on_stage else None,
        )
    device = next(models["dense"].parameters()).device
    predicted = {"dense": costs.fixed + costs.blocks, "pruned": costs.of(mask)}
    measured = {name: times.median_ns for name, times in steps.items()}
    return {
        "table": latency.signature,
        "device_name": device_name(device),
        "repeats": repeats,
        "predicted_ms": {name: ns / 1e6 for name, ns in predicted.items()},
        "measured_ms": {name: ns / 1e6 for name, ns in measured.items()},
        "quartiles_ms": {n: [t.low_ns / 1e6, t.high_ns / 1e6] for n, t in steps.items()},
        "predicted_ratio": predicted["pruned"] / predicted["dense"],
        "measured_ratio": measured["pruned"] / measured["dense"],
    }


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Compute with so many processor threads, and as before afterwards; None changes nothing."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise InputError(f"threads is {threads}; allowed: 1 to {MOST_THREADS:,}")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _signature(
    loaded: LoadedModel, model_class: str, context_tokens: int, repeats: int
) -> TableSignature:
    source = loaded.source
    return TableSignature(
        depthsearch=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        model=ModelName(
            source=Path(source).name if is_path(source) else source,
            revision=loaded.revision,
            fingerprint=loaded.fingerprint,
        ),
        model_class=model_class,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device),
        device_name=device_name(loaded.device),
        threads=torch.get_num_threads(),
        context_tokens=context_tokens,
        repeats=repeats,
        protocol=(
            f"one decoding step, batch 1, behind {context_tokens} tokens in the KV cache; medians "
            f"of {repeats} steps after 3, parts timed within steps, in turns with whole steps; "
            "interrupted steps left out where 5 others remain; "
            "medians of sublayers of one kind and shape averaged"
        ),
    )


def _site_times(sites: Sequence[Site], times: StepTimes) -> Iterator[SiteTime]:
    for site, cost, own in zip(sites, times.site_costs, times.sites, strict=True):
        yield SiteTime(
            name=site.name,
            ns=cost,
            measured_ns=own.median_ns,
            quartiles_ns=(own.low_ns, own.high_ns),
        )


def _measured(times: Times) -> Measured:
    return Measured(ns=times.median_ns, quartiles_ns=(times.low_ns, times.high_ns))
