"""Calibration batches, and the positions of them that an objective looks at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from depthsearch.calibration.windows import batches
from depthsearch.errors import DataError
from depthsearch.evaluation.backend import UnitResult
from depthsearch.space import Mask, Status


@dataclass(frozen=True)
class Sample:
    """One batch: ids `[sequence, window]`, and sorted positions `[sequence, count]` of it.

    Every position has a next token. Sequences that have fewer than others repeat one, whose
    `weights` `[sequence, count]` are 0; those of the others are 1, and so are all without any.
    """

    ids: Tensor
    positions: Tensor
    weights: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """The next tokens `[sequence * count]` at the positions."""
        return self.ids.gather(1, self.positions + 1).flatten()

    def at(self, hidden: Tensor) -> Tensor:
        """Hidden states `[sequence * count, hidden]` at the positions, on their device."""
        index = self.positions.to(hidden.device).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index).flatten(0, 1).to(self.positions.device)

    def placed(self, found: Tensor, like: Tensor) -> Tensor:
        """`[sequence, window, hidden]` with `found` at the positions and zeros elsewhere.

        The inverse of `at`, with the shape, type and device of `like`.
        """
        index = self.positions.to(like.device).unsqueeze(-1).expand(-1, -1, like.shape[-1])
        values = found.to(like).unflatten(0, tuple(self.positions.shape))
        return torch.zeros_like(like).scatter_(1, index, values)

    def by_sequence(self, losses: Tensor) -> Tensor:
        """The mean over positions: `[mask, sequence]` of `[mask, sequence * count]`."""
        by_sequence: Tensor = losses.double().unflatten(1, tuple(self.positions.shape))
        if self.weights is None:
            return by_sequence.mean(-1)
        weights = self.weights.to(by_sequence)
        return (by_sequence * weights).sum(-1) / weights.sum(-1)


def draw_samples(
    windows: Tensor,
    batch_tokens: int,
    share: float,
    seed: int,
    device: torch.device,
    pad: int | None = None,
) -> tuple[Sample, ...]:
    """Windows `[sequence, window]` in batches of `batch_tokens`, placed on `device`.

    `share` of the positions of each sequence is drawn from `seed` and the number of the batch,
    one position at least. With `pad`, windows are an encoder-decoder's: positions are those of the
    second half that are followed by another token than that. Raises DataError for no windows or
    windows of fewer than two tokens.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise DataError(
            f"calibration windows must be [sequence, 2 or more tokens]: got {list(windows.shape)}"
        )
    window = windows.shape[1]
    if pad is not None:
        return _written_samples(windows, batch_tokens, share, seed, device, pad)
    count = max(1, math.ceil(share * (window - 1)))
    return tuple(
        Sample(ids.to(device), _draw_positions(ids.shape[0], window, count, seed, batch).to(device))
        for batch, ids in enumerate(batches(windows, batch_tokens))
    )


def unit_result(by_sequence: Tensor, cost_tokens: float) -> UnitResult:
    """The result of losses `[mask, sequence]`: masks with one that is not finite have failed."""
    finite = by_sequence.isfinite().all(-1).tolist()
    return UnitResult(
        tuple(
            tuple(row) if ok else () for row, ok in zip(by_sequence.tolist(), finite, strict=True)
        ),
        tuple(Status.OK if ok else Status.NON_FINITE for ok in finite),
        cost_tokens,
    )


def joined(first: UnitResult, second: UnitResult) -> UnitResult:
    """One unit out of two over the same batch, masks of `first` before those of `second`."""
    return UnitResult(
        first.losses + second.losses,
        first.statuses + second.statuses,
        first.cost_tokens + second.cost_tokens,
    )


def halved(compute: Callable[[Sequence[Mask]], UnitResult], masks: Sequence[Mask]) -> UnitResult:
    """`compute(masks)`; out of memory splits the set, down to a single quarantined mask."""
    try:
        return compute(masks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(masks) == 1:
            return UnitResult(((),), (Status.OUT_OF_MEMORY,), 0.0)
    half = len(masks) // 2
    return joined(halved(compute, masks[:half]), halved(compute, masks[half:]))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on the processor torch raises a plain RuntimeError for that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)


def _draw_positions(sequences: int, window: int, count: int, seed: int, batch: int) -> Tensor:
    """Sorted positions `[sequence, count]` that have a next token, drawn without repetition."""
    rng = np.random.default_rng([seed, batch])
    drawn = [np.sort(rng.choice(window - 1, size=count, replace=False)) for _ in range(sequences)]
    return torch.from_numpy(np.stack(drawn))


def _written_samples(
    windows: Tensor, batch_tokens: int, share: float, seed: int, device: torch.device, pad: int
) -> tuple[Sample, ...]:
    """As `draw_samples`, of what an encoder-decoder writes."""
    half = windows.shape[1] // 2
    # Targets stand in front: the padding behind them begins where the first one is missing.
    ends = (windows[:, half + 1 :] != pad).long().cumprod(1).sum(1)
    if windows.shape[1] % 2 or int(ends.min()) < 1:
        raise DataError("an encoder-decoder needs rows of two equal halves with a target in each")
    most = max(1, math.ceil(share * int(ends.max())))
    found: list[Sample] = []
    start = 0
    for batch, ids in enumerate(batches(windows, batch_tokens)):
        rng = np.random.default_rng([seed, batch])
        positions = np.full((len(ids), most), half)
        weights = np.zeros((len(ids), most))
        for row, end in enumerate(ends[start : start + len(ids)].tolist()):
            count = max(1, math.ceil(share * end))
            positions[row, :count] = half + np.sort(rng.choice(end, size=count, replace=False))
            positions[row, count:] = positions[row, count - 1]
            weights[row, :count] = 1
        placed = (torch.from_numpy(array).to(device) for array in (positions, weights))
        found.append(Sample(ids.to(device), *placed))
        start += len(ids)
    return tuple(found)
