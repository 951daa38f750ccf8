"""Teacher-forced perplexity, of text in windows or of targets behind their sources."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from depthsearch.calibration.pair_rows import pad_token
from depthsearch.calibration.windows import batches, check_windows
from depthsearch.errors import DataError, ModelError
from depthsearch.model.anatomy import context_window

LOGITS_AT_ONCE = 1 << 23
"""Logits held at a time: 32 MiB in float32, whatever the vocabulary."""


@dataclass(frozen=True)
class Perplexity:
    """`value = exp(loss_nats)`, the mean over all scored tokens, of which there are `tokens`.

    `losses` holds the mean negative log likelihood of each window in nats per scored token,
    `stderr` is that of `loss_nats` over windows, None for one window. `protocol` says how all this
    was measured.
    """

    value: float
    loss_nats: float
    stderr: float | None
    tokens: int
    protocol: str
    losses: tuple[float, ...]


def perplexity(
    model: Any,
    windows: Tensor,
    batch_tokens: int = 2048,
    on_progress: Callable[[int, int], None] | None = None,
    logits_at_once: int = LOGITS_AT_ONCE,
    scored: Tensor | None = None,
) -> Perplexity:
    """Score `windows` `[n, window]` of token ids; the first token of each is context only.

    The body runs once a batch; logits are then formed for a few positions at a time by the model's
    own forward, so that scaling and capping of logits apply and memory does not grow with
    vocabulary times tokens. A model that does not allow this is run whole, window by window.
    At most `logits_at_once` logits exist at a time. `on_progress(done, total)` counts windows.
    With `scored`, bool `[n, window]`, only these tokens count, such as those of targets.

    Windows of an encoder-decoder are what it reads and, equally long, what enters its decoder, as
    `PairRows` makes them. It is run whole, window by window, and scored on what should follow in
    its decoder, up to the padding.

    Raises DataError for windows of the wrong shape, length or vocabulary, ModelError for a loss
    that is not finite.
    """
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise DataError(
            f"windows have shape {list(windows.shape)}; allowed: [n, window], at least one "
            "window of 2 tokens"
        )
    two = bool(getattr(model.config, "is_encoder_decoder", False))
    wanted = _wanted(windows, scored, two)
    halves = windows.chunk(2, dim=1) if two else (windows,)
    rows = model.get_input_embeddings().weight.shape[0]
    for part in halves:
        check_windows(part, rows, context_window(model))
    device = next(model.parameters()).device
    losses: list[float] = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            counts = _target_counts(model, windows) if two else wanted.sum(1).tolist()
            head = (
                _Translation(model, counts) if two else _ChunkedHead(model, logits_at_once, wanted)
            )
            for batch in batches(windows, batch_tokens):
                losses += head.losses(batch.to(device))
                if on_progress is not None:
                    on_progress(len(losses), len(windows))
    finally:
        model.train(training)
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        raise ModelError(
            f"the loss of window {bad} is {losses[bad]}: the model's logits overflow; "
            "load it in float32"
        )
    mean, stderr = _mean(losses, counts)
    written = halves[-1].shape[1]
    protocol = f"nonoverlapping window={written}, first token unscored"
    if two:
        protocol = (
            f"targets of at most {written} tokens behind sources of as many, first token unscored"
        )
    elif scored is not None:
        protocol = f"targets alone, behind their prompts, {written} tokens of both at most"
    return Perplexity(
        value=math.exp(mean) if mean < 700 else math.inf,
        loss_nats=mean,
        stderr=stderr,
        tokens=sum(counts),
        protocol=f"{protocol}, n={len(windows)} windows",
        losses=tuple(losses),
    )


def _mean(losses: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """The mean over tokens of windows that have `counts` of them, and its standard error.

    The error is that of a ratio over windows, None for one.
    """
    windows, tokens = len(losses), sum(counts)
    mean = math.fsum(loss * count for loss, count in zip(losses, counts, strict=True)) / tokens
    if windows == 1:
        return mean, None
    squares = math.fsum(
        ((loss - mean) * count * windows / tokens) ** 2
        for loss, count in zip(losses, counts, strict=True)
    )
    return mean, math.sqrt(squares / (windows - 1) / windows)


def _wanted(windows: Tensor, scored: Tensor | None, two: bool) -> Tensor:
    """Which tokens of `windows` `[n, window]` behind the first are scored, `[n, window - 1]`."""
    if scored is None:
        return torch.ones_like(windows[:, 1:], dtype=torch.bool)
    if two or scored.shape != windows.shape or scored.dtype != torch.bool:
        raise DataError(
            "tokens to score are named by a bool for each token of a decoder-only model's windows"
        )
    wanted = scored[:, 1:]
    if not bool(wanted.any(1).all()):
        raise DataError("a window has no token to score behind its first one")
    return wanted


def _target_counts(model: Any, rows: Tensor) -> list[int]:
    """How many tokens of each of `rows` `[n, 2 * window]` follow the first one of the decoder."""
    written = rows[:, rows.shape[1] // 2 :]
    counts = (written[:, 1:] != pad_token(model)).long().cumprod(1).sum(1)
    if rows.shape[1] % 2 or int(counts.min()) < 1:
        raise DataError(
            "windows of an encoder-decoder are two equal halves, with a target in the second"
        )
    return [int(count) for count in counts]


class _Translation:
    """Runs an encoder-decoder on sources and targets, of which `counts` tokens are scored."""

    def __init__(self, model: Any, counts: Sequence[int]) -> None:
        self._model = model
        self._counts = iter(counts)

    def losses(self, rows: Tensor) -> list[float]:
        """The mean loss in nats of each of the next `rows` `[batch, 2 * window]`."""
        return [self._whole(row.unsqueeze(0), next(self._counts)) for row in rows]

    def _whole(self, row: Tensor, count: int) -> float:
        read, written = row.chunk(2, dim=1)
        logits = self._model(
            input_ids=read,
            attention_mask=(read != pad_token(self._model)).long(),
            decoder_input_ids=written[:, :count],
            use_cache=False,
        ).logits
        return float(_nats(logits[0], written[0, 1 : count + 1]).double().mean())


class _ChunkedHead:
    """Runs body and head of one model apart from each other, once that is shown to be right.

    Of each window the tokens behind the first that `wanted` `[n, window - 1]` names are scored.
    """

    def __init__(self, model: Any, logits_at_once: int, wanted: Tensor) -> None:
        self._model = model
        self._logits_at_once = logits_at_once
        self._wanted = iter(wanted)
        self._decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._apart: bool | None = None if accepts else False

    def losses(self, ids: Tensor) -> list[float]:
        """The mean loss in nats of each of the next rows, `ids` `[batch, window]`."""
        wanted = torch.stack([next(self._wanted) for _ in ids]).to(ids.device)
        if self._apart is not False:
            output, last = self._body(ids)
            if self._apart is None:
                self._apart = self._agrees(output, last)
            if self._apart:
                return self._scored(output, ids, wanted)
        return [self._whole(row, which) for row, which in zip(ids, wanted, strict=True)]

    def _body(self, ids: Tensor) -> tuple[Any, Tensor]:
        """What the decoder returned, and the logits `[batch, 1, vocab]` of the last position."""
        seen: list[Any] = []
        handle = self._decoder.register_forward_hook(lambda _m, _a, output: seen.append(output))
        try:
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        finally:
            handle.remove()
        return (seen[0] if len(seen) == 1 else None), logits

    def _agrees(self, output: Any, last: Tensor) -> bool:
        """Whether the head, fed with the decoder's output, repeats the model's own logits."""
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            return False
        with _fed(self._decoder, output, hidden[:, -1:]):
            logits = self._model(
                input_ids=torch.zeros_like(hidden[:, -1:, 0], dtype=torch.int64), use_cache=False
            ).logits
        return logits.shape == last.shape and torch.allclose(
            logits.float(), last.float(), rtol=1e-3, atol=1e-3, equal_nan=True
        )

    def _scored(self, output: Any, ids: Tensor, wanted: Tensor) -> list[float]:
        hidden = output.last_hidden_state[:, :-1][wanted]
        targets = ids[:, 1:][wanted]
        vocab = self._model.get_input_embeddings().weight.shape[0]
        nats = []
        for start in range(0, len(targets), step := max(1, self._logits_at_once // vocab)):
            part = hidden[start : start + step].unsqueeze(0)
            with _fed(self._decoder, output, part):
                logits = self._model(
                    input_ids=targets[start : start + step].unsqueeze(0), use_cache=False
                ).logits
            nats.append(_nats(logits[0], targets[start : start + step]))
        rows = torch.cat(nats).double().split(wanted.sum(1).tolist())
        return [float(row.mean()) for row in rows]

    def _whole(self, row: Tensor, wanted: Tensor) -> float:
        logits = self._model(input_ids=row.unsqueeze(0), use_cache=False).logits
        return float(_nats(logits[0, :-1][wanted], row[1:][wanted]).double().mean())


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


@contextmanager
def _fed(decoder: Any, like: Any, hidden: Tensor) -> Iterator[None]:
    """Let `decoder` return `hidden` `[batch, seq, hidden]` in an output such as `like`."""
    own = decoder.__dict__.get("forward")
    decoder.forward = lambda *_args, **_kwargs: type(like)(last_hidden_state=hidden)
    try:
        yield
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
