"""How fast models run beside each other, and how much memory one needs on its own."""

from __future__ import annotations

import inspect
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthsearch.errors import DepthsearchError, ModelError
from depthsearch.model.anatomy import context_window
from depthsearch.model.load import load_model
from depthsearch.quality.size import memory_bytes
from depthsearch.sources import one_line

_CHILD = "from depthsearch.quality.speed import _measure_own_peak; _measure_own_peak()"


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the repeats of one measurement."""

    median_ms: float
    min_ms: float
    max_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Timing:
        """Summarize at least one time."""
        return cls(statistics.median(times_ms), min(times_ms), max(times_ms))


@dataclass(frozen=True)
class Speed:
    """Rates are over all sequences of the batch, from the medians.

    `prefill` times the whole prompt, `decode` one step of one token a sequence. The prompt of an
    encoder-decoder is what it reads; its first written token belongs to the prefill.
    `peak_memory_bytes` is what the run held on the device at most (weights, cache, activations);
    None on a CPU, where `peak_memory` measures it in a process of its own.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill: Timing
    decode: Timing
    peak_memory_bytes: int | None
    protocol: str


@dataclass(frozen=True)
class PeakMemory:
    """The most a fresh process held while it loaded and ran one checkpoint.

    On a CPU this is resident memory (weights count once more while they are read from the file),
    `baseline_bytes` of which the libraries took before loading; on CUDA it is what was allocated
    on the device, with a baseline of 0.
    """

    peak_bytes: int
    baseline_bytes: int
    device: str


def measure_speed(
    models: Mapping[str, Any],
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    batch: int = 1,
    repeats: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Speed]:
    """Time prefill and cached greedy decoding of several models in turns (A B A B ...).

    Taking turns makes heat, clock changes and neighbours hit all models alike. Each model has one
    untimed turn first. `on_progress(done, total)` counts turns.

    Raises ModelError for lengths that a model can't take.
    """
    lengths = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    for name, value in {**lengths, "batch": batch, "repeats": repeats}.items():
        if value < 1:
            raise ModelError(f"{name} is {value}; allowed: 1 or more")
    for name, model in models.items():
        _check_length(name, model, prompt_tokens + new_tokens)
    prefills: dict[str, list[float]] = {name: [] for name in models}
    decodes: dict[str, list[float]] = {name: [] for name in models}
    peaks: dict[str, int] = {}
    total = (repeats + 1) * len(models)
    done = 0
    for turn in range(repeats + 1):
        for name, model in models.items():
            prefill, decode, peak = _turn(model, prompt_tokens, new_tokens, batch)
            if turn > 0:
                prefills[name].append(prefill)
                decodes[name].append(decode)
            if peak is not None:
                peaks[name] = max(peak, peaks.get(name, 0))
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    protocol = (
        f"prompt={prompt_tokens}, new={new_tokens}, batch={batch}, median of {repeats} "
        "interleaved turns after 1 warm-up"
    )
    result = {}
    for name in models:
        timed, step = Timing.of(prefills[name]), Timing.of(decodes[name])
        result[name] = Speed(
            prefill_tokens_per_s=1e3 * batch * prompt_tokens / timed.median_ms,
            decode_tokens_per_s=1e3 * batch / step.median_ms,
            prefill=timed,
            decode=step,
            peak_memory_bytes=peaks.get(name),
            protocol=protocol,
        )
    return result


def peak_memory(
    path: str | Path,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    batch: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    timeout_s: float = 1800,
) -> PeakMemory:
    """Load and run the checkpoint at `path` in a fresh process and report the most it held.

    Raises ModelError when the checkpoint can't be loaded or run.
    """
    if not Path(path).exists():
        raise ModelError(f"{path}: no such directory; give that of a checkpoint")
    request = json.dumps([str(path), prompt_tokens, new_tokens, batch, dtype, device])
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, request],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{path}: not measured within {timeout_s:.0f} s") from error
    lines = child.stdout.strip().splitlines()
    if child.returncode != 0 or not lines:
        said = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise ModelError(f"{path}: the process that measures its memory failed ({said})")
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise ModelError(answer["error"])
    return PeakMemory(**answer)


def _measure_own_peak() -> None:
    """Body of the child process: print one JSON object as the last line of standard output."""
    path, prompt_tokens, new_tokens, batch, dtype, device = json.loads(sys.argv[1])
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    try:
        baseline = _resident_peak_bytes()
        loaded = load_model(path, dtype=dtype, device=device)
        _check_length(path, loaded.model, prompt_tokens + new_tokens)
        _turn(loaded.model, prompt_tokens, new_tokens, batch)
        on_cuda = loaded.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_cuda else _resident_peak_bytes()
        answer: dict[str, object] = {
            "peak_bytes": peak,
            "baseline_bytes": 0 if on_cuda else baseline,
            "device": loaded.device.type,
        }
    except (DepthsearchError, RuntimeError, MemoryError) as error:
        answer = {"error": one_line(error)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def _resident_peak_bytes() -> int:
    """The largest resident set this process has had.

    Linux carries the parent's maximum into `getrusage` of a new program, but not into VmHWM.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _check_length(name: str, model: Any, tokens: int) -> None:
    limit = context_window(model)
    if limit is not None and tokens > limit:
        raise ModelError(
            f"{name}: {tokens} tokens of prompt and answer exceed the model's {limit} positions; "
            "lower prompt_tokens or new_tokens"
        )


def _turn(
    model: Any, prompt_tokens: int, new_tokens: int, batch: int
) -> tuple[float, float, int | None]:
    """Milliseconds of one prefill and of one decoding step, and peak device bytes of this model."""
    device = next(model.parameters()).device
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(batch * prompt_tokens, device=device).view(batch, prompt_tokens) % vocab
    keep = (
        {"logits_to_keep": 1}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )
    held = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    with torch.no_grad():
        start = _now_ms(device)
        output, further = _prefill(model, ids, keep)
        filled = _now_ms(device)
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(dim=-1)
            output = further(token, output.past_key_values)
        end = _now_ms(device)
    peak = None
    if device.type == "cuda":
        extra = torch.cuda.max_memory_allocated(device) - held
        peak = memory_bytes(model) + extra
    return filled - start, (end - filled) / new_tokens, peak


def _prefill(
    model: Any, ids: Tensor, keep: Mapping[str, int]
) -> tuple[Any, Callable[[Tensor, Any], Any]]:
    """What `model` returns for the prompt `ids` `[batch, seq]`, and what makes a further step.

    The latter takes a token a sequence and the cache.
    """
    if not getattr(model.config, "is_encoder_decoder", False):

        def further(tokens: Tensor, cache: Any) -> Any:
            return model(input_ids=tokens, past_key_values=cache, use_cache=True, **keep)

        return further(ids, None), further
    encoded = model.get_encoder()(input_ids=ids)[0]

    def written(tokens: Tensor, cache: Any) -> Any:
        return model(
            encoder_outputs=(encoded,),
            decoder_input_ids=tokens,
            past_key_values=cache,
            use_cache=True,
        )

    return written(ids[:, :1], None), written


def _now_ms(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3
