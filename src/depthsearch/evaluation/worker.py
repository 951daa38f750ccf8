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
from depthsearch.calibration.tasks import Task
from depthsearch.evaluation.crew import Answer
from depthsearch.evaluation.inprocess import InProcess
from depthsearch.evaluation.refitted import Refitted, repairing
from depthsearch.evaluation.spread import share_answers, share_batches
from depthsearch.evaluation.streamed import Streamed
from depthsearch.evaluation.turns import Repair
from depthsearch.evaluation.written import Written
from depthsearch.model.anatomy import describe
from depthsearch.model.load import checkpoint_folder, load_model, resolve_devices
from depthsearch.model.packing import PackedModel, unpack
from depthsearch.model.placement import place_on
from depthsearch.model.replay import Mode
from depthsearch.model.streaming import StreamedModel
from depthsearch.sources import one_line
from depthsearch.space import Mask

Judge = InProcess | Refitted | Streamed | Written

_TEXTS_KEPT = 3


@dataclass(frozen=True)
class ModelSource:
    """Where a worker gets the model: as `load_model` takes it, on `device`, with `threads`.

    `device` may name several GPUs, which the worker's model is spread over. A `streamed` model
    stays in its files, and hidden states take `host_bytes` of the worker's memory at most.
    """

    path: str
    dtype: str
    device: str
    revision: str | None
    trust_remote_code: bool
    threads: int
    streamed: bool = False
    host_bytes: int | None = None


@dataclass(frozen=True)
class Text:
    """Windows `[sequence, window]` with all that `InProcess` needs to judge masks on them.

    With a `repair` masks are fitted on the windows `fit` first. With a `task` they are judged by
    what they write.
    """

    name: str
    windows: Any
    objective: str
    mode: str
    batch_tokens: int
    positions: float
    seed: int
    fit: Any = None
    repair: Repair = "none"
    task: Task | None = None
    toward_text: float = 0.0


@dataclass(frozen=True)
class Computed:
    """A unit's losses `[mask][sequence]`, statuses and seconds; or `error`, one line.

    `costs` are as in `UnitResult`. After a `fatal` error the worker can't be trusted any more.
    """

    losses: tuple[tuple[float, ...], ...] = ()
    statuses: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str | None = None
    fatal: bool = False
    costs: tuple[float, ...] = ()


class Worker:
    """Holds the model, or what streams it, and the texts last used."""

    def __init__(self, source: ModelSource, packed: PackedModel | None = None) -> None:
        torch.set_num_threads(source.threads)
        self._host_bytes = source.host_bytes
        self._streamed: StreamedModel | None = None
        if source.streamed:
            folder = checkpoint_folder(source.path, source.revision)
            self._streamed = StreamedModel.open(folder, source.dtype, source.device)
            self._model = self._streamed.model
        elif packed is not None:
            self._model = place_on(unpack(packed), resolve_devices(source.device))
        else:
            self._model = load_model(
                source.path,
                source.dtype,
                source.device,
                source.revision,
                source.trust_remote_code,
            ).model
        self._anatomy = describe(self._model)
        self._texts: OrderedDict[str, Judge] = OrderedDict()

    def about(self) -> dict[str, Any]:
        """Where this worker runs."""
        return {"node": socket.gethostname(), "pid": os.getpid()}

    def run(self, text: Text, batch: int, keys: Sequence[str]) -> Computed:
        """One unit; an error other than lack of memory is told, not raised.

        With streamed weights `batch` names a share of the batches (see `spread`).
        """
        start = time.perf_counter()
        try:
            answers = self._answers(text, batch, [Mask.from_key(key) for key in keys])
        except Exception as error:  # noqa: BLE001 - whatever it is, the driver decides
            fatal = "CUDA" in str(error) or isinstance(error, MemoryError)
            return Computed(error=f"{type(error).__name__}: {one_line(error)}", fatal=fatal)
        return Computed(
            tuple(answer.losses for answer in answers),
            tuple(str(answer.status) for answer in answers),
            time.perf_counter() - start,
            costs=tuple(a.cost_tokens for a in answers if a.cost_tokens is not None),
        )

    def _answers(self, text: Text, batch: int, masks: Sequence[Mask]) -> Sequence[Answer]:
        backend = self._backend(text)
        if isinstance(backend, Streamed):
            share = share_batches(batch)
            sequences = [backend.sequences[number] for number in share]
            return share_answers(backend.run_all(masks, share), sequences)
        unit = backend.run(batch, masks)
        costs = unit.costs or (None,) * len(masks)
        return [Answer(*found) for found in zip(unit.losses, unit.statuses, costs, strict=True)]

    def _backend(self, text: Text) -> Judge:
        if text.name not in self._texts:
            while len(self._texts) >= _TEXTS_KEPT:
                self._texts.popitem(last=False)
            self._texts[text.name] = self._made(text)
        self._texts.move_to_end(text.name)
        return self._texts[text.name]

    def _made(self, text: Text) -> Judge:
        what: dict[str, Any] = {
            "windows": torch.from_numpy(text.windows.copy()),
            "objective": OBJECTIVES[text.objective](),
            "mode": Mode(text.mode),
            "batch_tokens": text.batch_tokens,
            "positions": text.positions,
            "seed": text.seed,
        }
        if self._streamed is not None:
            return Streamed(self._streamed, **what, host_bytes=self._host_bytes)
        if text.task is not None:
            return Written(InProcess(self._model, self._anatomy, **what), text.task)
        fit = None if text.fit is None else torch.from_numpy(text.fit.copy())
        what |= {"model": self._model, "anatomy": self._anatomy}
        return repairing(text.repair, fit, toward_text=text.toward_text, **what)
