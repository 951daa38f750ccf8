"""Export the result of a run, and measure checkpoints beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthsearch import __version__
from depthsearch.calibration.tasks import Task
from depthsearch.config import RunConfig, to_yaml
from depthsearch.config.schema import ClusterConfig
from depthsearch.errors import DataError, ModelError, StorageError
from depthsearch.evaluation.samples import is_out_of_memory
from depthsearch.export import CardData, ExportResult, Figure, export
from depthsearch.journal import read_journal
from depthsearch.model.anatomy import context_window
from depthsearch.model.load import LoadedModel, load_model
from depthsearch.model.patches import load_patches
from depthsearch.model.repair import Patch
from depthsearch.quality import (
    ChrF,
    Perplexity,
    Size,
    Speed,
    measure_size,
    measure_speed,
    peak_memory,
    perplexity,
    score_written,
)
from depthsearch.run.directory import BEST, JOURNAL, REPAIR, read_json, understood, write_json
from depthsearch.run.fits import fit_name
from depthsearch.run.front import find_point
from depthsearch.run.latency import beside_prediction
from depthsearch.run.search import run_config
from depthsearch.run.session import Session
from depthsearch.run.signing import software
from depthsearch.run.workers import threads_of
from depthsearch.space import Budget, Mask

EXPORT = "export.json"
_CHECK_TOKENS = 24
_PROMPT_TOKENS, _NEW_TOKENS = 256, 32
_STEPS = 10
"""Decoding steps for each turn of the speed measurement, where latency was a cost."""

_CHECK_LOGITS = 1 << 24

OnStage = Callable[[str, int, int], None]


def export_run(
    run: Path,
    out: Path,
    *,
    overwrite: bool = False,
    measure: bool = True,
    repeats: int = 5,
    on_stage: OnStage | None = None,
    point: int | None = None,
    budget: str | None = None,
) -> tuple[ExportResult, dict[str, Any]]:
    """Export the best mask of a finished run to `out`, with held-out figures beside the dense.

    Of a run over several budgets, that at its own budget, or at the `point` of front.json with
    that number or at that `budget`, such as "keep_params=0.8" or, for a pair,
    "keep_params=0.8,keep_kv_bytes=0.6". The figures also go to export.json in the run directory,
    for its report, those of other points to export-NUMBER.json. Raises RunDirectoryError for an
    unfinished run or a point it doesn't have, ConfigError, ExportError, StorageError.
    """
    config, best = finished_run(run)
    summary_name, option = EXPORT, ""
    if point is not None or budget is not None:
        answer = find_point(run, point, budget)
        best |= answer
        option = f" --point {answer['point']}"
        summary_name = EXPORT if answer["own"] else f"export-{answer['point']}.json"
    # Writing a checkpoint takes the whole model anyway, in the memory of this machine.
    whole = config.model.model_copy(update={"streamed": False})
    # Repairs are in the run already: the text that they were fitted on may be gone.
    unfitted = config.calibration.model_copy(update={"fit_text": None, "fit_column": None})
    session = Session.open(config.model_copy(update={"model": whole, "calibration": unfitted}))
    session.check_model(best, run)
    mask = Mask.from_key(best["mask"])
    splits = session.splits(config.search.seed, fit_tokens=0)
    same_text = best["signature"]["data"].get("documents") == session.documents.fingerprint
    signature = best["signature"] | (
        {"measured_with": measured_with(session.loaded)} if measure else {}
    )
    repair = best.get("repair")
    patches: tuple[Patch, ...] = ()
    if repair is not None:
        path, model = run / repair.get("file", REPAIR), session.loaded.model
        patches = load_patches(path, model, session.anatomy, mask, repair["sha256"])
    rows: list[dict[str, Any]] = []
    latency: dict[str, Any] = {}

    @memory_suffices()
    def figures(directory: Path) -> tuple[Figure, ...]:
        if not measure:
            return ()
        if not same_text:
            raise DataError(
                f"{session.documents.source} has changed since the search, which may have selected "
                "on what is held out of it now: restore it, then export again"
            )
        small = load_model(
            str(directory),
            str(session.loaded.dtype).removeprefix("torch."),
            session.loaded.devices,
        )
        rows.extend(
            measure_beside(
                {"dense": session.loaded, "pruned": small},
                splits.heldout,
                task=session.heldout_task(splits),
                repeats=repeats,
                on_stage=on_stage,
            )
        )
        if session.latency is not None:
            latency.update(
                beside_prediction(
                    session.latency,
                    session.anatomy.sites,
                    mask,
                    {"dense": session.loaded.model, "pruned": small.model},
                    _STEPS * repeats,
                    on_stage,
                )
            )
        return card_figures(rows, latency)

    with understood(run / JOURNAL):
        searched = to_yaml(read_journal(run / JOURNAL)[0]["config"])
    reads, writes = config.calibration.languages
    data = CardData(
        origin=best["origin"],
        budget=Budget.from_json(best["budget"]),
        signature=signature,
        repair=repair,
        calibration=session.documents_name,
        fitted_on=fit_name(session.documents_name, best["signature"]["data"].get("fit")),
        toward_text=config.search.toward_text,
        command=f"depthsearch search config.yaml --out run && depthsearch export run model{option}",
        config=searched,
        languages=(reads, writes) if reads and writes else None,
        starts=() if session.rows is None else session.rows.starts,
    )
    result = export(
        session.loaded,
        session.anatomy,
        mask,
        out,
        data,
        overwrite=overwrite,
        # Windows too short for the check leave it to random ids.
        tokens=check_tokens(splits.heldout, session.loaded.model)
        if splits.window_tokens >= _CHECK_TOKENS
        else None,
        measure=figures,
        patches=patches,
    )
    summary = {
        "version": __version__,
        "path": str(result.path),
        "mask": mask.key,
        "blocks": len(result.plan.pairs),
        "parameters": result.parameters,
        "disk_bytes": result.disk_bytes,
        "verification": None if result.verification is None else result.verification.to_json(),
        "signature": signature,
        "repair": repair,
        "rows": rows,
        "latency": latency or None,
        "unmeasured": result.unmeasured,
        "unrecorded": None,
    }
    try:
        write_json(run / summary_name, summary)
    except StorageError as error:
        # The export is whole: it may be of somebody else's run.
        summary["unrecorded"] = str(error)
    return result, summary


def measured_with(loaded: LoadedModel) -> dict[str, Any]:
    """What figures of speed and memory can't be separated from, besides what was searched with."""
    return software() | {"device": str(loaded.device)}


@contextmanager
def memory_suffices() -> Iterator[None]:
    """Bring memory that runs out while models are measured down to one line; a ModelError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            "memory does not suffice to measure these models: free some, or choose another device"
        ) from error


def finished_run(run: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration, in the number format that the search ran in, and best.json of a run.

    Another machine may take another format for `auto`. What follows a search on a cluster needs
    none, nor Ray: this process does it, on the CPU. Raises RunDirectoryError for an unfinished run.
    """
    config = run_config(run)
    best = read_json(
        run / BEST, f"it has not finished; continue it with `depthsearch resume {run}`"
    )
    with understood(run / BEST):
        _check(best)
    model = config.model.model_copy(update={"dtype": best["signature"]["dtype"]})
    if config.cluster.backend == "ray":
        model = model.model_copy(update={"device": "cpu"})
    alone = ClusterConfig(threads=threads_of(config))
    return config.model_copy(update={"model": model, "cluster": alone}), best


def _check(best: Mapping[str, Any]) -> None:
    """Look at all that is taken from best.json later; raises what plain data raises."""
    repair = best.get("repair") or {"sha256": ""}
    texts = (best["mask"], best["origin"], best["signature"]["dtype"], repair["sha256"])
    mappings = (best["budget"], best["signature"]["data"], best["signature"]["model"], repair)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("mask, origin, signature.dtype or repair.sha256 is no text")
    if not all(isinstance(part, Mapping) for part in mappings):
        raise TypeError("budget, repair or a part of the signature is no mapping")


def check_tokens(windows: Tensor, model: Any) -> Tensor:
    """Real text `[2, seq]` for the check of an export, short enough for its logits to be small."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = max(8, _CHECK_LOGITS // (2 * vocabulary))
    if not model.config.is_encoder_decoder:
        return windows[:2, :tokens]
    return torch.cat([half[:, :tokens] for half in windows[:2].chunk(2, dim=1)], dim=1)


def measure_beside(
    models: Mapping[str, LoadedModel],
    windows: Tensor,
    *,
    scored: Tensor | None = None,
    task: Task | None = None,
    repeats: int = 5,
    on_stage: OnStage | None = None,
) -> list[dict[str, Any]]:
    """One row a model: perplexity on `windows` `[n, window]`, size, speed in turns, peak memory.

    Of the windows the tokens `scored` alone count, where they are given. With a `task` also chrF++
    of what the models write for it.
    """
    stage = on_stage or (lambda *_: None)
    texts: dict[str, Perplexity] = {}
    for name, loaded in models.items():
        texts[name] = perplexity(
            loaded.model,
            windows,
            scored=scored,
            on_progress=lambda done, total, name=name: stage(  # type: ignore[misc]
                f"perplexity, {name}", done, total
            ),
        )
    written: dict[str, ChrF] = {}
    if task is not None:
        written = score_written(
            {name: loaded.model for name, loaded in models.items()},
            task,
            on_progress=lambda name, done, total: stage(f"chrF++, {name}", done, total),
        )
    prompt = _prompt_tokens(models.values())
    speeds = measure_speed(
        {name: loaded.model for name, loaded in models.items()},
        prompt,
        _NEW_TOKENS,
        repeats=repeats,
        on_progress=lambda done, total: stage("speed", done, total),
    )
    rows = []
    for place, (name, loaded) in enumerate(models.items()):
        stage("memory", place, len(models))
        size = measure_size(loaded.model, loaded.folder)
        peak = speeds[name].peak_memory_bytes
        if peak is None and loaded.folder is not None:
            dtype = str(loaded.dtype).removeprefix("torch.")
            peak = peak_memory(
                loaded.folder, prompt, _NEW_TOKENS, dtype=dtype, device=loaded.devices
            ).peak_bytes
        row = _row(name, texts[name], size, speeds[name], peak)
        if name in written:
            row |= {"chrf": written[name].score, "chrf_protocol": written[name].protocol}
        rows.append(row)
        stage("memory", place + 1, len(models))
    return rows


def _prompt_tokens(models: Iterable[LoadedModel]) -> int:
    """The usual prompt, or the longest that every model has room for before its answer."""
    limits = [context_window(loaded.model) for loaded in models]
    room = min((limit for limit in limits if limit is not None), default=_PROMPT_TOKENS * 2)
    return max(1, min(_PROMPT_TOKENS, room - _NEW_TOKENS))


def _row(
    name: str, text: Perplexity, size: Size, speed: Speed, peak_bytes: int | None
) -> dict[str, Any]:
    return {
        "name": name,
        "perplexity": text.value,
        "cross_entropy_nats": text.loss_nats,
        "cross_entropy_stderr": text.stderr,
        "perplexity_protocol": text.protocol,
        "parameters": size.parameters,
        "memory_bytes": size.memory_bytes,
        "disk_bytes": size.disk_bytes,
        "kv_bytes_per_token": size.kv_bytes_per_token,
        **({"kv_protocol": KV_PROTOCOL} if size.kv_windowed else {}),
        "prefill_tokens_per_s": speed.prefill_tokens_per_s,
        "decode_tokens_per_s": speed.decode_tokens_per_s,
        "prefill_ms": [speed.prefill.min_ms, speed.prefill.median_ms, speed.prefill.max_ms],
        "decode_ms": [speed.decode.min_ms, speed.decode.median_ms, speed.decode.max_ms],
        "speed_protocol": speed.protocol,
        "peak_memory_bytes": peak_bytes,
    }


KV_PROTOCOL = "KV cache: what a token adds before the sliding windows are full"

MEASURES = (
    ("held-out perplexity", "perplexity"),
    ("chrF++ of texts written", "chrf"),
    ("parameters", "parameters"),
    ("weights on disk, bytes", "disk_bytes"),
    ("KV cache, bytes per token", "kv_bytes_per_token"),
    ("prefill, tokens/s", "prefill_tokens_per_s"),
    ("decode, tokens/s", "decode_tokens_per_s"),
    ("peak memory, bytes", "peak_memory_bytes"),
)
"""What people want to see of a row, in order: a phrase and its key, which a row may lack."""


def measures(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Those of `MEASURES` that all rows have, measured or not."""
    return [(phrase, key) for phrase, key in MEASURES if all(key in row for row in rows)]


def card_figures(
    rows: list[dict[str, Any]], latency: Mapping[str, Any] | None = None
) -> tuple[Figure, ...]:
    """The rows of a dense and a pruned model as the table of a model card, `latency` with them."""
    dense, pruned = rows
    figures = [Figure(phrase, dense[key], pruned[key]) for phrase, key in measures(rows)]
    if latency:
        step = f"decoding step behind {latency['table']['context_tokens']:,} tokens, ms"
        for how in ("predicted", "measured"):
            times = latency[f"{how}_ms"]
            figures.append(Figure(f"{step}, {how}", times["dense"], times["pruned"]))
    keys = ("perplexity_protocol", "chrf_protocol", "kv_protocol", "speed_protocol")
    protocol = "; ".join(pruned[key] for key in keys if key in pruned)
    return (*figures, Figure("protocol", protocol, "the same run"))
