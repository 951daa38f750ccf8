"""The export check: does the small model compute what the masked model computes?

The masked model's logits are computed here; a clean interpreter without depthsearch loads the
export and compares its own with them, for prefill, for cached decoding in chunks and token by
token, and for left-padded rows (of an encoder-decoder: rows that it reads, padded at their end).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from depthsearch.errors import ExportError, StorageError
from depthsearch.export import probe
from depthsearch.model.anatomy import Anatomy, context_window
from depthsearch.model.load import LoadedModel
from depthsearch.model.switches import masked
from depthsearch.sources import one_line, quiet
from depthsearch.space import Mask

FLOAT32_TOLERANCE = 1e-4
ARGMAX_TOLERANCE = 0.999
_ROWS = 2
_NO_MEMORY = ("out of memory", "allocate memory", "memoryerror")
PROBE_TEXT = "One naïve check: 3.14 × 2 = 6.28 and “so on”.\n\tβ 你好"


@dataclass(frozen=True)
class Case:
    """One export to check: the directory and the masked model that it should equal."""

    loaded: LoadedModel
    anatomy: Anatomy
    mask: Mask
    path: Path


@dataclass(frozen=True)
class Verification:
    """How the export compares with the masked model, over `positions` positions of all passes.

    `differing` of them have a logit that is not the same to the last bit.

    float32 passes with every difference below 1e-4; narrower types with the same argmax on 99.9 %
    of the positions. In both the tokenizer must agree, no weight may be missing or left over, and
    where the logits are identical greedy generation must be too.
    """

    dtype: str
    max_difference: float
    cached_max_difference: float
    differing: int
    argmax_agreement: float
    positions: int
    generation_equal: bool
    tokenizer_equal: bool
    loading_problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the export is what it should be."""
        worst = _largest(self.max_difference, self.cached_max_difference)
        if self.dtype == "float32":
            close = worst < FLOAT32_TOLERANCE
        else:
            close = np.isfinite(worst) and self.argmax_agreement >= ARGMAX_TOLERANCE
        whole = self.tokenizer_equal and not self.loading_problems
        return bool(close and whole and (self.generation_equal or worst > 0))

    @property
    def text(self) -> str:
        """The figures in one line."""
        said = (
            f"{self.dtype}, {self.positions} positions: largest difference of a logit "
            f"{self.max_difference:.2g} (with a cache {self.cached_max_difference:.2g}), "
            f"{self.differing} positions not bit-equal, same most likely token on "
            f"{100 * self.argmax_agreement:.2f} %, greedy generation "
            f"{'identical' if self.generation_equal else 'differs'}"
        )
        if not self.tokenizer_equal:
            said += ", the tokenizer differs"
        if self.loading_problems:
            said += (
                f", {len(self.loading_problems)} weights missing or left over "
                f"(first: {self.loading_problems[0]})"
            )
        return said

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "dtype": self.dtype,
            "max_difference": self.max_difference,
            "cached_max_difference": self.cached_max_difference,
            "differing": self.differing,
            "argmax_agreement": self.argmax_agreement,
            "positions": self.positions,
            "generation_equal": self.generation_equal,
            "passed": self.passed,
        }


def verify_export(
    loaded: LoadedModel,
    anatomy: Anatomy,
    mask: Mask,
    path: Path,
    tokens: Tensor | None = None,
    new_tokens: int = 16,
) -> Verification:
    """Compare the export in `path` with the masked model, in a clean interpreter.

    `tokens` `[batch, seq]` are the ids to compare on, by default random ones; the last
    `new_tokens` of them are decoded one by one. Rows of an encoder-decoder are what it reads and
    then, equally long, what it writes, each padded at its end. Raises ExportError where the export
    does not load, StorageError where the temporary files can't be written.
    """
    return verify_exports([Case(loaded, anatomy, mask, path)], tokens, new_tokens)[0]


def verify_exports(
    cases: Sequence[Case], tokens: Tensor | None = None, new_tokens: int = 16
) -> tuple[Verification, ...]:
    """`verify_export` for several exports in one interpreter.

    Where one does not pass, all are computed anew and compared once more, both sides in full: a
    fault of the machine does not repeat itself, a wrong export does.
    """
    found = _compare_all(cases, tokens, new_tokens)
    if all(verification.passed for verification in found):
        return found
    return _compare_all(cases, tokens, new_tokens)


def _compare_all(
    cases: Sequence[Case], tokens: Tensor | None, new_tokens: int
) -> tuple[Verification, ...]:
    with tempfile.TemporaryDirectory(prefix="depthsearch-check-") as name:
        scratch = Path(name)
        jobs = [
            _job(case, scratch / f"{place}.safetensors", tokens, new_tokens)
            for place, case in enumerate(cases)
        ]
        figures = _ask_clean_interpreter(jobs, scratch)
    return tuple(
        _verification(job["dtype"], found) for job, found in zip(jobs, figures, strict=True)
    )


def random_ids(model: Any, new_tokens: int) -> Tensor:
    """Seeded random ids `[2, seq]` that fit the model's context, fewer for a large vocabulary.

    Those of an encoder-decoder, to be read and to be written, hold no padding.
    """
    config = model.config
    two = probe.reads_apart(model)
    # Some have a smaller vocabulary to write with.
    vocabulary = min(
        config.vocab_size, getattr(config, "decoder_vocab_size", None) or config.vocab_size
    )
    prompt = int(np.clip(2**24 // config.vocab_size, 48, 128))
    room = context_window(model) or prompt + new_tokens
    prompt = max(2, min(prompt, room - new_tokens))
    length = (prompt + new_tokens) * (2 if two else 1)
    ids = np.random.default_rng(0).integers(0, vocabulary, size=(_ROWS, length), dtype=np.int64)
    if two:
        ids[ids == config.pad_token_id] = 0 if config.pad_token_id else 1
    return torch.from_numpy(ids)


def _job(case: Case, file: Path, tokens: Tensor | None, new_tokens: int) -> dict[str, Any]:
    """Compute what the masked model says, store it in `file`, and describe the comparison."""
    model, tokenizer = case.loaded.model, case.loaded.tokenizer
    ids = random_ids(model, new_tokens) if tokens is None else tokens
    _require_length(model, ids, new_tokens)
    on_device = ids.to(case.loaded.device)
    expected = {"ids": ids.cpu()}
    with quiet(), masked(model, case.anatomy, case.mask):
        for name in probe.PASSES:
            expected[name] = probe.run_pass(model, name, on_device, new_tokens)
        expected["generated"] = probe.generate(model, on_device, new_tokens)
    try:
        save_file({name: tensor.contiguous() for name, tensor in expected.items()}, file)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"the expected logits can't be written to {file.parent} ({one_line(error)}): free some "
            "space there or set TMPDIR to another disk"
        ) from error
    return {
        "path": str(case.path.resolve()),
        "tensors": str(file),
        "dtype": str(case.loaded.dtype).removeprefix("torch."),
        "device": str(case.loaded.device),
        "attention": model.config._attn_implementation,
        "single_steps": new_tokens,
        "text": None if tokenizer is None else PROBE_TEXT,
        "text_ids": None if tokenizer is None else list(tokenizer(PROBE_TEXT)["input_ids"]),
        "chat_template": getattr(tokenizer, "chat_template", None),
    }


def _require_length(model: Any, ids: Tensor, new_tokens: int) -> None:
    two = probe.reads_apart(model)
    least = (new_tokens + 2) * (2 if two else 1)
    if ids.ndim != 2 or ids.shape[1] < least:
        raise ExportError(
            f"the check needs ids [batch, seq] with more than {least - 1} tokens a row: "
            f"got {tuple(ids.shape)}"
        )
    if two and ids.shape[1] % 2:
        raise ExportError(
            "the check of an encoder-decoder needs ids [batch, seq] of which each row is as long "
            f"to be read as to be written: got {tuple(ids.shape)}, an odd number"
        )


def _ask_clean_interpreter(jobs: list[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    request, figures, log = (scratch / n for n in ("request.json", "figures.json", "log.txt"))
    path = [entry for entry in sys.path if entry]
    asked = {"jobs": jobs, "threads": torch.get_num_threads(), "path": path}
    request.write_text(json.dumps(asked), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-I", str(Path(probe.__file__)), str(request), str(figures)]
    with ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        ended = subprocess.run(
            command, env=environment, stdout=output, stderr=output, check=False, cwd=scratch
        )
    if ended.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = lines[-1][:300] if lines else f"it ended with code {ended.returncode}"
        if ended.returncode == -signal.SIGKILL or any(
            word in reason.lower() for word in _NO_MEMORY
        ):
            raise ExportError(
                "there is not enough memory to check the export beside the model that it comes "
                f"from ({reason}): export with model.device: cpu, or on a larger machine"
            )
        raise ExportError(
            f"plain transformers can't load and run the export in a fresh interpreter ({reason})"
        )
    found: list[dict[str, Any]] = json.loads(figures.read_text(encoding="utf-8"))
    return found


def _verification(dtype: str, found: dict[str, Any]) -> Verification:
    passes = [found[name] for name in probe.PASSES]
    positions = sum(entry["positions"] for entry in passes)
    return Verification(
        dtype=dtype,
        max_difference=found["prefill"]["difference"],
        cached_max_difference=_largest(*(found[n]["difference"] for n in ("cached", "padded"))),
        differing=sum(entry["differing"] for entry in passes),
        argmax_agreement=sum(entry["agreeing"] for entry in passes) / positions,
        positions=positions,
        generation_equal=found["generation_equal"],
        tokenizer_equal=found["tokenizer_equal"],
        loading_problems=tuple(found["loading"]),
    )


def _largest(*values: float) -> float:
    """The largest value, or NaN where any is NaN, which Python's own `max` may hide."""
    return float(np.max(values))
