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

    Every position has a next token.
    """

    ids: Tensor
    positions: Tensor

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
        return by_sequence.mean(-1)


def draw_samples(
    windows: Tensor, batch_tokens: int, share: float, seed: int, device: torch.device
) -> tuple[Sample, ...]:
    """Windows `[sequence, window]` in batches of `batch_tokens`, placed on `device`.

    `share` of the positions of each sequence is drawn from `seed` and the number of the batch,
    one position at least. Raises DataError for no windows or windows of fewer than two tokens.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise DataError(
            f"calibration windows must be [sequence, 2 or more tokens]: got {list(windows.shape)}"
        )
    window = windows.shape[1]
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
