"""Teacher-forced perplexity over non-overlapping windows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from depthsearch.calibration.windows import batches, check_windows
from depthsearch.errors import DataError, ModelError
from depthsearch.model.anatomy import context_window

LOGITS_AT_ONCE = 1 << 23
"""Logits held at a time: 32 MiB in float32, whatever the vocabulary."""


@dataclass(frozen=True)
class Perplexity:
    """`value = exp(loss_nats)`; `stderr` is that of `loss_nats` over windows, None for one window.

    `losses` holds the mean negative log likelihood of each window in nats per scored token,
    `tokens` counts the scored tokens, `protocol` says how all this was measured.
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
) -> Perplexity:
    """Score `windows` `[n, window]` of token ids; the first token of each is context only.

    The body runs once a batch; logits are then formed for a few positions at a time by the model's
    own forward, so that scaling and capping of logits apply and memory does not grow with
    vocabulary times tokens. A model that does not allow this is run whole, window by window.
    At most `logits_at_once` logits exist at a time. `on_progress(done, total)` counts windows.

    Raises DataError for windows of the wrong shape, length or vocabulary, ModelError for a loss
    that is not finite.
    """
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise DataError(
            f"windows have shape {list(windows.shape)}; allowed: [n, window], at least one "
            "window of 2 tokens"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    check_windows(windows, rows, context_window(model))
    device = next(model.parameters()).device
    losses: list[float] = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            head = _ChunkedHead(model, logits_at_once)
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
    count, window = windows.shape
    mean = math.fsum(losses) / count
    stderr = None
    if count > 1:
        variance = math.fsum((loss - mean) ** 2 for loss in losses) / (count - 1)
        stderr = math.sqrt(variance / count)
    return Perplexity(
        value=math.exp(mean) if mean < 700 else math.inf,
        loss_nats=mean,
        stderr=stderr,
        tokens=count * (window - 1),
        protocol=f"nonoverlapping window={window}, first token unscored, n={count} windows",
        losses=tuple(losses),
    )


class _ChunkedHead:
    """Runs body and head of one model apart from each other, once that is shown to be right."""

    def __init__(self, model: Any, logits_at_once: int) -> None:
        self._model = model
        self._logits_at_once = logits_at_once
        self._decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._apart: bool | None = None if accepts else False

    def losses(self, ids: Tensor) -> list[float]:
        """The mean loss in nats of each row of `ids` `[batch, window]`."""
        if self._apart is not False:
            output, last = self._body(ids)
            if self._apart is None:
                self._apart = self._agrees(output, last)
            if self._apart:
                return self._scored(output, ids)
        return [self._whole(row) for row in ids]

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

    def _scored(self, output: Any, ids: Tensor) -> list[float]:
        hidden = output.last_hidden_state[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        vocab = self._model.get_input_embeddings().weight.shape[0]
        nats = []
        for start in range(0, len(targets), step := max(1, self._logits_at_once // vocab)):
            part = hidden[start : start + step].unsqueeze(0)
            with _fed(self._decoder, output, part):
                logits = self._model(
                    input_ids=targets[start : start + step].unsqueeze(0), use_cache=False
                ).logits
            nats.append(_nats(logits[0], targets[start : start + step]))
        means = torch.cat(nats).double().view(len(ids), -1).mean(dim=1)
        return [float(mean) for mean in means]

    def _whole(self, row: Tensor) -> float:
        logits = self._model(input_ids=row.unsqueeze(0), use_cache=False).logits
        return float(_nats(logits[0, :-1], row[1:]).double().mean())


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
