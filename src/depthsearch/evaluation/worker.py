"""What one worker of a cluster does: load the model once, then compute units.

Nothing here knows the cluster; masks come as keys and losses go as numbers.
"""

from __future__ import annotations

import os
import socket
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from depthsearch.calibration.objectives import OBJECTIVES
from depthsearch.evaluation.inprocess import InProcess
from depthsearch.model.anatomy import describe
from depthsearch.model.load import load_model
from depthsearch.model.packing import PackedModel, unpack
from depthsearch.model.replay import Mode
from depthsearch.sources import one_line
from depthsearch.space import Mask

_TEXTS_KEPT = 3


@dataclass(frozen=True)
class ModelSource:
    """Where a worker gets the model: as `load_model` takes it, on `device`, with `threads`."""

    path: str
    dtype: str
    device: str
    revision: str | None
    trust_remote_code: bool
    threads: int


@dataclass(frozen=True)
class Text:
    """Windows `[sequence, window]` with all that `InProcess` needs to judge masks on them."""

    name: str
    windows: Any
    objective: str
    mode: str
    batch_tokens: int
    positions: float
    seed: int


@dataclass(frozen=True)
class Computed:
    """A unit's losses `[mask][sequence]`, statuses and seconds; or `error`, one line.

    After a `fatal` error the worker can't be trusted any more.
    """

    losses: tuple[tuple[float, ...], ...] = ()
    statuses: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str | None = None
    fatal: bool = False


class Worker:
    """Holds the model and the texts last used."""

    def __init__(self, source: ModelSource, packed: PackedModel | None = None) -> None:
        torch.set_num_threads(source.threads)
        if packed is not None:
            self._model = unpack(packed).to(source.device)
        else:
            self._model = load_model(
                source.path,
                source.dtype,
                source.device,
                source.revision,
                source.trust_remote_code,
            ).model
        self._anatomy = describe(self._model)
        self._texts: OrderedDict[str, InProcess] = OrderedDict()

    def about(self) -> dict[str, Any]:
        """Where this worker runs."""
        return {"node": socket.gethostname(), "pid": os.getpid()}

    def run(self, text: Text, batch: int, keys: Sequence[str]) -> Computed:
        """One unit; an error other than lack of memory is told, not raised."""
        start = time.perf_counter()
        try:
            result = self._backend(text).run(batch, [Mask.from_key(key) for key in keys])
        except Exception as error:  # noqa: BLE001 - whatever it is, the driver decides
            fatal = "CUDA" in str(error) or isinstance(error, MemoryError)
            return Computed(error=f"{type(error).__name__}: {one_line(error)}", fatal=fatal)
        return Computed(
            result.losses,
            tuple(str(status) for status in result.statuses),
            time.perf_counter() - start,
        )

    def _backend(self, text: Text) -> InProcess:
        if text.name not in self._texts:
            while len(self._texts) >= _TEXTS_KEPT:
                self._texts.popitem(last=False)
            self._texts[text.name] = InProcess(
                self._model,
                self._anatomy,
                torch.from_numpy(text.windows.copy()),
                OBJECTIVES[text.objective](),
                mode=Mode(text.mode),
                batch_tokens=text.batch_tokens,
                positions=text.positions,
                seed=text.seed,
            )
        self._texts.move_to_end(text.name)
        return self._texts[text.name]
