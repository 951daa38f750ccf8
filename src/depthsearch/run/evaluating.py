"""Measure checkpoints beside each other on a text that is not split."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from depthsearch import __version__
from depthsearch.calibration.chrf import check_sacrebleu
from depthsearch.calibration.parallel import SOURCE, ParallelText, load_parallel
from depthsearch.calibration.prompt_rows import prompt_rows
from depthsearch.calibration.tasks import Task, pair_task, translation_task
from depthsearch.calibration.text import Documents, load_documents
from depthsearch.calibration.windows import fixed_order, text_sample, text_windows
from depthsearch.errors import InputError
from depthsearch.export.verify import PROBE_TEXT
from depthsearch.model.load import LoadedModel, load_model
from depthsearch.run.figures import OnStage, measure_beside, measured_with, memory_suffices
from depthsearch.run.tasks import make_rows


@dataclass(frozen=True)
class Targets:
    """What a model should write for the texts it reads, and how it is asked to.

    `column` holds the targets; in `prompt` {source} stands for the text, and with `chat` it is a
    user's message. `languages` are those that the tokenizer of an encoder-decoder needs for both
    sides. Of `written` texts what the models write is scored, `new_tokens` tokens of each at most.
    Raises InputError for what can't be done.
    """

    column: str
    prompt: str = "{source}\n"
    chat: bool = False
    languages: tuple[str | None, str | None] = (None, None)
    written: int = 0
    new_tokens: int = 128

    def __post_init__(self) -> None:
        if SOURCE not in self.prompt:
            raise InputError(
                f"--prompt is {self.prompt!r}: it must hold {SOURCE}, which stands for the text"
            )
        if self.written:
            check_sacrebleu()


def evaluate_checkpoint(
    model: str,
    text: str,
    *,
    column: str | None = None,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    beside: str | None = None,
    targets: Targets | None = None,
    window_tokens: int = 512,
    tokens: int = 16384,
    dtype: str = "auto",
    device: str = "auto",
    repeats: int = 5,
    on_stage: OnStage | None = None,
) -> dict[str, Any]:
    """Perplexity, size and speed of a checkpoint, and of `beside` in the same run if given.

    `revision` is that of `model`. All of `text` counts as evaluation text: its documents in one
    fixed shuffled order, up to `tokens` tokens. With `targets` each row of it is a text and what
    should be written for it, and the targets alone are scored; an encoder-decoder needs them.
    Raises InputError.
    """
    found: Documents | ParallelText
    if targets is None:
        found = load_documents(text, column, split, subset)
    else:
        found = load_parallel(text, column, targets.column, split, subset)
    names = {"model": model} if beside is None else {"dense": beside, "model": model}
    loaded = {
        name: load_model(path, dtype, device, revision if name == "model" else None)
        for name, path in names.items()
    }
    try:
        sample = _sample(loaded, found, targets, window_tokens, tokens)
    except InputError as error:
        raise type(error)(_as_options(str(error))) from None
    with memory_suffices():
        rows = measure_beside(
            loaded,
            sample.windows,
            scored=sample.scored,
            task=sample.task,
            repeats=repeats,
            on_stage=on_stage,
        )
    return {
        "version": __version__,
        "text": found.source,
        "text_fingerprint": sample.documents.fingerprint,
        "dtype": {name: str(m.dtype).removeprefix("torch.") for name, m in loaded.items()},
        "models": {
            name: {"source": m.source, "revision": m.revision, "fingerprint": m.fingerprint}
            for name, m in loaded.items()
        },
        "measured_with": measured_with(loaded["model"]),
        "rows": rows,
    }


@dataclass(frozen=True)
class _Sample:
    """Documents as the models are given them, windows of them, and what is to be written.

    Of the windows of a decoder-only model with targets, those are `scored`, all tokens else.
    """

    documents: Documents
    windows: Tensor
    scored: Tensor | None = None
    task: Task | None = None


def _sample(
    loaded: Mapping[str, LoadedModel],
    text: Documents | ParallelText,
    targets: Targets | None,
    window_tokens: int,
    tokens: int,
) -> _Sample:
    """The text as the model that is evaluated is given it."""
    own = loaded["model"]
    model, tokenizer = own.model, own.tokenizer
    two = {bool(m.model.config.is_encoder_decoder) for m in loaded.values()}
    if len(two) > 1:
        raise InputError("of the two models one is an encoder-decoder and the other is not")
    if len({tuple(m.tokenizer(PROBE_TEXT)["input_ids"]) for m in loaded.values()}) > 1:
        raise InputError(
            "the two models have different tokenizers: perplexities of different tokens are no "
            "comparison; evaluate each by itself, or name the --beside that the model was made from"
        )
    if isinstance(text, Documents):
        if two == {True}:
            raise InputError(
                f"{type(model).__name__} is an encoder-decoder, which is judged on what it should "
                "write for what it reads: name the columns of both, --column and --target-column"
            )
        return _Sample(text, text_windows(text, tokenizer, window_tokens, tokens))
    assert targets is not None
    documents, pairs = text.prompted(targets.prompt, tokenizer, targets.chat)
    rows = make_rows(model, tokenizer, pairs, targets.languages)
    if rows is not None and targets.chat:
        raise InputError("--chat is there for decoder-only models alone: leave it out")
    most = targets.new_tokens
    task: Task | None = None
    if rows is not None:
        windows, used = text_sample(documents, tokenizer, window_tokens, tokens, rows)
        if targets.written:
            task = translation_task(rows, used[: targets.written], window_tokens, most)
        return _Sample(documents, windows, task=task)
    in_order = {text: pairs[text] for text in fixed_order(documents)}
    windows, scored = prompt_rows(in_order, tokenizer, window_tokens, tokens)
    if targets.written:
        asked = list(in_order.values())[: min(targets.written, len(windows))]
        task = pair_task(asked, model, tokenizer, most)
    return _Sample(documents, windows, scored, task)


def _as_options(said: str) -> str:
    """What is said of keys of a run file, said of the options that stand for them here."""
    said = said.replace("objective.max_new_tokens", "calibration.new_tokens")
    return _KEY.sub(lambda found: f"--{found[1].replace('_', '-')}", said)


_KEY = re.compile(r"calibration\.(\w+)")
