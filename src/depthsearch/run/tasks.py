"""The task score of a run: what a run file asks for, checked, and the prompts that masks answer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from depthsearch.calibration.chrf import CHRF_KIND, check_sacrebleu, chrf_signature
from depthsearch.calibration.pair_rows import PairRows, pad_token, set_languages
from depthsearch.calibration.parallel import Pair, ParallelText, load_parallel
from depthsearch.calibration.tasks import Task, continuation_task, pair_task, translation_task
from depthsearch.calibration.text import Documents, load_documents
from depthsearch.config import CalibrationConfig, RunConfig, SearchConfig
from depthsearch.errors import ConfigError
from depthsearch.model.load import LoadedModel
from depthsearch.searchers import needs_sensitivity


def scores_text(kind: str) -> bool:
    """Whether a loss of that kind judges what masks write."""
    return kind == CHRF_KIND


def check_task(config: RunConfig, search: SearchConfig) -> None:
    """Refuse what can't be had with a task score, before anything slow; raises ConfigError."""
    searched = scores_text(search.score or config.objective.kind)
    ranked = scores_text(config.objective.kind)
    if not searched and not ranked:
        return
    check_sacrebleu()
    if config.model.streamed:
        raise ConfigError(
            "the loss chrf has the model write text, which takes a pass over all weights for each "
            "token, and model.streamed brings them anew for each pass: take another loss, or set "
            "model.streamed to false"
        )
    for asked, key, repair in (
        (searched, "search.repair", search.repair),
        (ranked, "search.finish", search.finished),
    ):
        if asked and repair != "none":
            raise ConfigError(
                f"{key} is {repair}, but the loss chrf judges what masks write as they are cut: "
                f"set {key} to none, or judge by another loss"
            )


def refuse_task(config: RunConfig, what: str) -> None:
    """Raise ConfigError where `what` would judge what is written instead of windows of text."""
    if scores_text(config.objective.kind):
        raise ConfigError(
            f"{what} judges masks on windows of text, which the loss chrf does not: set "
            "objective.kind to another loss"
        )


def check_two_stacks(config: RunConfig) -> None:
    """Refuse what can't be had with an encoder-decoder; raises ConfigError."""
    calibration, search = config.calibration, config.search
    if calibration.target_column is None:
        raise ConfigError(
            "the model is an encoder-decoder, which is judged on what it should write for what it "
            "reads: name the columns of both, calibration.column and calibration.target_column"
        )
    refused = (
        (calibration.chat, "calibration.chat", "leave it out"),
        (calibration.fit_text is not None, "calibration.fit_text", "leave it out"),
        (needs_sensitivity(search.method), f"search.method {search.method}", "choose another"),
    )
    for asked, what, remedy in refused:
        if asked:
            raise ConfigError(f"{what} is there for decoder-only models alone: {remedy}")


def make_rows(
    model: Any,
    tokenizer: Any,
    pairs: Mapping[str, Pair],
    languages: tuple[str | None, str | None],
) -> PairRows | None:
    """What makes rows of the sources and targets of an encoder-decoder, None for other models.

    `languages` are those of both sides. Raises ConfigError for languages that the tokenizer does
    not take, DataError for a model without a padding token.
    """
    if not model.config.is_encoder_decoder:
        if languages != (None, None):
            raise ConfigError(
                "calibration.source_language and calibration.target_language are for the "
                "tokenizers of encoder-decoders: say in calibration.prompt what this model is to do"
            )
        return None
    # The model's own stays as it is: an export writes it.
    tokenizer = copy.deepcopy(tokenizer)
    set_languages(tokenizer, *languages)
    pad_token(model, tokenizer)
    return PairRows(pairs, model, tokenizer)


def load_text(calibration: CalibrationConfig) -> Documents | ParallelText:
    """The configured text, or sources with their targets; raises DataError."""
    where = (calibration.split, calibration.subset)
    if calibration.target_column is None:
        return load_documents(calibration.text, calibration.column, *where)
    return load_parallel(calibration.text, calibration.column, calibration.target_column, *where)


def prompted(
    text: Documents | ParallelText, calibration: CalibrationConfig, tokenizer: Any
) -> tuple[Documents, Mapping[str, Pair]]:
    """The documents of a run, and the pair that each holds, if they do; raises DataError."""
    if isinstance(text, Documents):
        return text, {}
    return text.prompted(calibration.prompt, tokenizer, calibration.chat)


def make_task(
    config: RunConfig,
    loaded: LoadedModel,
    pairs: Mapping[str, Pair],
    windows: Tensor,
    texts: Sequence[str],
    rows: PairRows | None = None,
) -> Task:
    """What masks write for one split: its `windows`, or its documents `texts` that hold `pairs`.

    Raises DataError where a prompt does not fit.
    """
    model, tokenizer, tokens = loaded.model, loaded.tokenizer, config.objective.max_new_tokens
    if rows is not None:
        return translation_task(rows, texts, config.calibration.window_tokens, tokens)
    if not pairs:
        return continuation_task(windows, model, tokenizer, tokens)
    return pair_task([pairs[text] for text in texts], model, tokenizer, tokens)


def protocol(config: RunConfig) -> str:
    """What the protocol of a signature says of texts written, nothing where there are none."""
    if not _anywhere(config):
        return ""
    most = f"texts of at most {config.objective.max_new_tokens} tokens"
    calibration = config.calibration
    if calibration.target_column is None:
        return f", {most} after the first half of each window against the dense model's"
    chat = " in the chat template" if calibration.chat else ""
    return f", {most} after {calibration.prompt!r}{chat} against {calibration.target_column!r}"


def metric(config: RunConfig) -> dict[str, Any]:
    """The metric with its version, for a signature; nothing where no text is scored."""
    return {"metric": chrf_signature()} if _anywhere(config) else {}


def _anywhere(config: RunConfig) -> bool:
    """Whether masks are judged by what they write in the search, in the finals or by an arm."""
    arms = config.compare.arms.values() if config.compare is not None else ()
    kinds = (config.score, config.objective.kind, *(arm.score for arm in arms))
    return CHRF_KIND in kinds
