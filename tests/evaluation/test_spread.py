"""Streamed weights on several workers: few passes over the weights, and not one bit changed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.tiny_backends import assorted_masks
from tests.tiny_models import keeping, save_tiny, tiny_ids

from depthsearch.calibration.objectives import KLDivergence
from depthsearch.evaluation import Streamed, evaluate
from depthsearch.evaluation.backend import UnitResult
from depthsearch.evaluation.crew import Answer, Done, Event, Failed, Joined, Lost, Unit
from depthsearch.evaluation.dispatch import Dispatcher
from depthsearch.evaluation.spread import (
    SpreadStreamed,
    by_batch,
    share_answers,
    share_batches,
    share_number,
)
from depthsearch.evaluation.worker import ModelSource, Text, Worker
from depthsearch.model.replay import Mode
from depthsearch.model.streaming import StreamedModel
from depthsearch.space import Mask, Status

MASKS = assorted_masks(8, count=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("spread") / "model", "llama")


class CrewHere:
    """Real workers in this process, each computing a unit when it is waited for.

    `reads[worker]` are the bytes of weights each unit read; `dies` names workers that are lost when
    they begin their first unit.
    """

    def __init__(self, workers: int, source: ModelSource, text: Text, dies: str = "") -> None:
        self.capacity = workers
        self.reads: dict[str, list[int]] = {}
        self.units: list[Unit] = []
        self._source, self._text, self._dies = source, text, dies
        self._workers: dict[str, Worker] = {}
        self._events: deque[Event] = deque()
        self._queue: deque[tuple[str, Unit]] = deque()

    def start(self, worker: str) -> None:
        self._workers[worker] = Worker(self._source)
        self.reads[worker] = []
        self._events.append(Joined(worker))

    def submit(self, worker: str, unit: Unit) -> None:
        self._queue.append((worker, unit))

    def kill(self, worker: str) -> None:
        raise AssertionError(worker)

    def wait(self, timeout: float) -> Sequence[Event]:
        if self._events:
            events, self._events = tuple(self._events), deque()
            return events
        worker, unit = self._queue.popleft()
        if worker == self._dies:
            self._queue = deque(held for held in self._queue if held[0] != worker)
            return (Lost(worker, "killed"),)
        streamed = self._workers[worker]._streamed
        assert streamed is not None
        before = streamed.bytes_read
        found = self._workers[worker].run(self._text, unit.batch, [mask.key for mask in unit.masks])
        if found.error is not None:
            return (Failed(worker, unit.number, found.error),)
        self.reads[worker].append(streamed.bytes_read - before)
        self.units.append(unit)
        statuses = map(Status, found.statuses)
        return (Done(worker, unit.number, tuple(map(Answer, found.losses, statuses)), 1.0),)


def made(
    checkpoint: Path, workers: int, rows: int = 8, dies: str = "", host_bytes: int | None = None
) -> tuple[SpreadStreamed, Streamed, CrewHere, Dispatcher]:
    """Batches of two sequences on so many workers, the same text streamed here, and the crew."""
    windows = tiny_ids(rows, 12, seed=3)
    text = Text("text", windows.numpy(), "kl", "site", 24, 0.5, 0)
    source = ModelSource(
        str(checkpoint), "float32", "cpu", None, False, 1, streamed=True, host_bytes=host_bytes
    )
    crew = CrewHere(workers, source, text, dies)
    dispatcher = Dispatcher(crew, clock=lambda: 0.0)
    dispatcher.start()

    def streamed(host_bytes: int | None) -> Streamed:
        model = StreamedModel.open(checkpoint, "float32", "cpu")
        return Streamed(
            model, windows, KLDivergence(), mode=Mode.SITE, batch_tokens=24, positions=0.5,
            host_bytes=host_bytes,
        )  # fmt: skip

    return (
        SpreadStreamed(dispatcher, streamed(host_bytes), "text"),
        streamed(None),
        crew,
        dispatcher,
    )


def all_units(backend: Any, masks: Sequence[Mask] = MASKS) -> list[UnitResult]:
    total = len(backend.sequences)
    return [backend.run(batch, masks, range(batch + 1, total)) for batch in range(total)]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_a_generation_takes_one_pass_of_each_worker(checkpoint: Path, workers: int) -> None:
    """Eight masks on four batches. Blocks are read once by a worker, the embeddings once ever."""
    spread, here, crew, _ = made(checkpoint, workers)
    assert all_units(spread) == all_units(here)
    model = StreamedModel.open(checkpoint, "float32", "cpu")
    one_pass = sum(model.block_bytes) + model.head_bytes
    assert all(reads == [one_pass + model.embedding_bytes] for reads in crew.reads.values())
    assert {unit.masks for unit in crew.units} == {tuple(sorted(MASKS, key=lambda m: m.key))}
    assert sorted(b for unit in crew.units for b in share_batches(unit.batch)) == [0, 1, 2, 3]

    others = assorted_masks(8, seed=1, count=8)
    assert all_units(spread, others) == all_units(here, others)
    assert all(reads[1:] == [one_pass] for reads in crew.reads.values())


@pytest.mark.parametrize(("workers", "passes"), [(4, 4), (5, 4), (6, 6), (9, 8)])
def test_more_workers_than_batches_part_the_masks(
    checkpoint: Path, workers: int, passes: int
) -> None:
    """Two batches: as many equal parts of the masks as keep all workers to a single pass."""
    spread, here, crew, _ = made(checkpoint, workers, rows=4)
    assert all_units(spread) == all_units(here)
    assert len(crew.units) == passes
    assert max(len(reads) for reads in crew.reads.values()) == 1


def test_a_race_changes_neither_result_nor_cost(checkpoint: Path) -> None:
    spread, here, crew, _ = made(checkpoint, 2, rows=12)
    assert evaluate(spread, MASKS, survivors=1) == evaluate(here, MASKS, survivors=1)
    assert len(crew.units) == 2
    assert spread.plan(MASKS) == here.plan(MASKS)
    assert spread.preparation == here.preparation
    assert spread.hints() == here.hints()


def test_a_worker_that_dies_costs_one_more_pass(checkpoint: Path) -> None:
    spread, here, crew, dispatcher = made(checkpoint, 2, dies="w0")
    assert all_units(spread) == all_units(here)
    assert dispatcher.state()["units_reissued"] >= 1
    assert sum(map(len, crew.reads.values())) == 2


def test_little_memory_takes_more_passes_of_a_worker_for_the_same_losses(checkpoint: Path) -> None:
    """Room for two masks on all batches, so for five on the half that a worker has."""
    state, looked_at = 12 * 64 * 4, 6 * 64 * 4
    spread, here, crew, _ = made(checkpoint, 2, host_bytes=8 * (4 * state + 2 * looked_at))
    assert all_units(spread) == all_units(here)
    assert len(crew.units) == 2
    model = StreamedModel.open(checkpoint, "float32", "cpu")
    for reads in crew.reads.values():
        assert model.embedding_bytes + 2 * min(model.block_bytes) < reads[0]
        assert reads[0] < 3 * (sum(model.block_bytes) + model.head_bytes)


def test_a_share_has_one_number() -> None:
    for batches in ((0,), (5,), (0, 1, 2), (3, 7), tuple(range(200))):
        assert share_batches(share_number(batches)) == batches
    assert share_number((1, 1)) == share_number((1,))


def test_what_failed_on_one_batch_has_failed_there_only() -> None:
    ok, bad, no_room = Status.OK, Status.NON_FINITE, Status.OUT_OF_MEMORY
    units = [
        UnitResult(((1.0, 2.0), (3.0, 4.0), ()), (ok, ok, no_room), 0.0),
        UnitResult(((5.0,), (), ()), (ok, bad, no_room), 0.0),
    ]
    answers = share_answers(units, (2, 1))
    assert answers[0] == Answer((1.0, 2.0, 5.0), ok)
    assert answers[1].losses[:2] == (3.0, 4.0)
    assert math.isnan(answers[1].losses[2])
    found = [list(by_batch(answer, (2, 1))) for answer in answers]
    assert found == [
        [((1.0, 2.0), ok), ((5.0,), ok)],
        [((3.0, 4.0), ok), ((), bad)],
        [((), no_room)] * 2,
    ]


def test_a_unit_that_fails_is_told_in_one_line(checkpoint: Path) -> None:
    text = Text("text", tiny_ids(4, 12).numpy(), "kl", "whole", 24, 0.5, 0)
    source = ModelSource(str(checkpoint), "float32", "cpu", None, False, 1, streamed=True)
    found = Worker(source).run(text, share_number((0,)), [keeping("11 11 11 11").key])
    assert found.error is not None
    assert "block by block" in found.error
    assert not found.fatal
