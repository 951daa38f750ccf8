from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthsearch.errors import ClusterError
from depthsearch.evaluation.crew import Answer, Limits, Lost, Unit
from depthsearch.evaluation.dispatch import QUEUED, Dispatcher
from depthsearch.evaluation.simulation import SimulatedCrew
from depthsearch.space import Mask, Status

SITES = 8


def masks(count: int) -> list[Mask]:
    return [Mask.from_key(f"{n:08b}") for n in range(1, count + 1)]


def loss(text: str, batch: int, mask: Mask) -> Answer:
    digest = hashlib.sha256(f"{text} {batch} {mask.key}".encode()).digest()
    return Answer((digest[0] / 7, digest[1] / 7), Status.OK)


def dispatcher(crew: SimulatedCrew, **limits: float) -> Dispatcher:
    found = Dispatcher(crew, Limits(**limits), clock=crew.clock)  # type: ignore[arg-type]
    found.start()
    return found


def search(found: Dispatcher, asked: list[Mask], batches: int, sure: bool) -> list[list[Answer]]:
    return [found.compute("t", b, asked, range(b + 1, batches), sure=sure) for b in range(batches)]


def expected(asked: list[Mask], batches: int) -> list[list[Answer]]:
    return [[loss("t", batch, mask) for mask in asked] for batch in range(batches)]


@given(
    workers=st.integers(1, 9),
    count=st.integers(1, 40),
    batches=st.integers(1, 5),
    sure=st.booleans(),
    deaths=st.floats(0, 0.3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_results_depend_on_neither_workers_nor_deaths(
    workers: int, count: int, batches: int, sure: bool, deaths: float, seed: int
) -> None:
    alive: dict[tuple[Mask, ...], int] = {}

    def fate(worker: str, unit: Unit, rng: np.random.Generator) -> str:
        # Each set of masks is hit once at most, so that no mask is taken for poison.
        hit = rng.random() < deaths and alive.setdefault(unit.masks, 0) == 0
        alive[unit.masks] = alive.get(unit.masks, 0) + hit
        return str(rng.choice(["lost", "failed", "hung"])) if hit else "done"

    crew = SimulatedCrew(
        workers, loss, lambda unit, rng: float(rng.uniform(0.1, 3)), fate, seed, start_s=1.0
    )
    found = dispatcher(crew, unit_timeout_s=20, restarts=100)

    assert search(found, masks(count), batches, sure) == expected(masks(count), batches)
    assert not found.quarantined


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("fate", ["lost", "failed", "hung"])
def test_a_poison_mask_is_given_up_by_name_and_all_else_is_computed(
    workers: int, fate: str
) -> None:
    asked = masks(32)
    poison = asked[19]
    victims: list[str] = []

    def fates(worker: str, unit: Unit, rng: np.random.Generator) -> str:
        if poison in unit.masks:
            if unit.masks == (poison,):
                victims.append(worker)
            return fate
        return "done"

    found = dispatcher(SimulatedCrew(workers, loss, fate=fates), unit_timeout_s=50)
    answers = search(found, asked, 2, sure=True)

    failure = Status.TIMED_OUT if fate == "hung" else Status.FAILED
    for batch, row in enumerate(answers):
        for mask, answer in zip(asked, row, strict=True):
            right = Answer((), failure) if mask == poison else loss("t", batch, mask)
            assert answer == right
    assert list(found.quarantined) == [poison]
    assert len(victims) <= 4
    if workers > 1:
        assert len(set(victims)) >= 2


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_mask_is_not_given_up_for_deaths_that_it_did_not_cause(workers: int) -> None:
    """Two workers in a row are killed while they have it alone, in each of the batches."""
    asked, deaths = masks(16), dict.fromkeys(range(3), 2)

    def fates(worker: str, unit: Unit, rng: np.random.Generator) -> str:
        if unit.masks == (asked[5],) and deaths[unit.batch]:
            deaths[unit.batch] -= 1
            return "lost"
        return "lost" if asked[5] in unit.masks and len(unit.masks) > 1 else "done"

    found = dispatcher(SimulatedCrew(workers, loss, fate=fates), restarts=20)

    answers = [found.compute("t", batch, asked, sure=True) for batch in range(3)]
    assert answers == expected(asked, 3)
    assert not any(deaths.values())
    assert not found.quarantined


@pytest.mark.parametrize(
    ("workers", "count", "mask_s", "record_s"),
    [(1, 64, 40, 0), (1, 16, 200, 0), (1, 16, 120, 200), (2, 64, 80, 0), (4, 128, 80, 0)],
)
def test_healthy_workers_that_take_long_are_given_less(
    workers: int, count: int, mask_s: float, record_s: float
) -> None:
    """Each takes far longer than the limit for all the masks, and less than it for one of them."""
    crew = SimulatedCrew(
        workers, loss, lambda unit, rng: mask_s * len(unit.masks), record_s=record_s
    )
    found = dispatcher(crew, unit_timeout_s=600)
    asked = masks(count)
    for text in ("one", "two"):
        begun, lost = crew.now, found.state()["units_reissued"]
        answers = found.compute(text, 0, asked, sure=True)
        assert answers == [loss(text, 0, mask) for mask in asked]
        ideal = mask_s * count / workers
    assert not found.quarantined
    # Once it is known how fast they are, none is taken for hung any more.
    assert found.state()["units_reissued"] == lost
    assert crew.now - begun <= 1.5 * ideal + 3 * record_s


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_text_that_takes_far_longer_than_all_before_is_computed_too(workers: int) -> None:
    crew = SimulatedCrew(
        workers, loss, lambda unit, rng: (0.01 if unit.text == "fast" else 80) * len(unit.masks)
    )
    found = dispatcher(crew, unit_timeout_s=600)
    for batch in range(8):
        found.compute("fast", batch, masks(64), sure=True)
    begun, asked = crew.now, masks(128)
    answers = found.compute("slow", 0, asked, sure=True)
    assert answers == [loss("slow", 0, mask) for mask in asked]
    assert not found.quarantined
    # What nobody can do in time is found out once, not again with every unit.
    assert crew.now - begun <= 80 * 128 / workers * 1.5 + 6 * 600


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("first", [0, 4])
def test_workers_that_hang_whatever_they_get_end_in_a_clear_error(workers: int, first: int) -> None:
    def fates(worker: str, unit: Unit, rng: np.random.Generator) -> str:
        return "done" if unit.text == "first" else "hung"

    crew = SimulatedCrew(workers, loss, fate=fates)
    found = dispatcher(crew, unit_timeout_s=600)
    if first:
        found.compute("first", 0, masks(first), sure=True)
    with pytest.raises(ClusterError, match="4 times in a row"):
        found.compute("second", 0, masks(64), sure=True)
    assert crew.now <= 15 * 600


def test_workers_that_never_come_up_end_in_a_clear_error() -> None:
    class Stillborn(SimulatedCrew):
        def start(self, worker: str) -> None:
            super().start(worker)
            self._events.clear()
            self._later(1.0, Lost(worker, "no such file"))

    with pytest.raises(ClusterError, match=r"4 times in a row \(no such file\)"):
        search(dispatcher(Stillborn(1, loss)), masks(2), 1, sure=True)


def test_a_cluster_without_room_ends_after_the_time_allowed() -> None:
    crew = SimulatedCrew(0, loss)
    with pytest.raises(ClusterError, match="no worker came up in 30 s"):
        search(dispatcher(crew, start_timeout_s=30), masks(2), 1, sure=True)
    assert crew.now >= 30


def test_workers_may_join_while_the_search_runs() -> None:
    crew = SimulatedCrew(1, loss)
    found = dispatcher(crew)
    found.compute("t", 0, masks(8), sure=True)
    assert found.ready == 1

    crew.capacity = 3
    found.compute("t", 1, masks(40), sure=True)
    for batch in range(2, 5):
        found.compute("t", batch, masks(40), sure=True)

    assert found.ready == 3
    assert all(worker["units"] for worker in found.state()["workers"])


def test_no_worker_holds_more_than_one_unit_beside_its_own() -> None:
    most = 0

    class Watching(SimulatedCrew):
        def submit(self, worker: str, unit: Unit) -> None:
            nonlocal most
            super().submit(worker, unit)
            most = max(most, len(self._held[worker]))

    search(dispatcher(Watching(3, loss)), masks(40), 15, sure=True)
    assert most == QUEUED == 2


def test_work_is_spread_over_batches_before_masks_are_split() -> None:
    seen: list[Unit] = []

    def fate(worker: str, unit: Unit, rng: np.random.Generator) -> str:
        seen.append(unit)
        return "done"

    search(dispatcher(SimulatedCrew(2, loss, fate=fate)), masks(32), 16, sure=True)
    whole = [unit for unit in seen if len(unit.masks) == 32]
    assert len(whole) >= 12
    assert {unit.batch for unit in seen} == set(range(16))

    seen.clear()
    search(dispatcher(SimulatedCrew(4, loss, fate=fate)), masks(32), 1, sure=True)
    assert len(seen) >= 8
    assert max(len(unit.masks) for unit in seen) <= 8
    runs = sorted([mask.key for mask in unit.masks] for unit in seen)
    assert [key for run in runs for key in run] == sorted(mask.key for mask in masks(32))


def test_one_worker_gets_whole_batches() -> None:
    crew = SimulatedCrew(1, loss)
    search(dispatcher(crew), masks(32), 4, sure=True)
    assert crew.units == 4


def test_what_a_race_ends_is_not_computed_later() -> None:
    computed: list[tuple[int, Mask]] = []

    def evaluate(text: str, batch: int, mask: Mask) -> Answer:
        computed.append((batch, mask))
        return loss(text, batch, mask)

    found = dispatcher(SimulatedCrew(2, evaluate))
    asked = masks(32)
    found.compute("t", 0, asked, range(1, 8), sure=False)
    for batch in range(1, 8):
        found.compute("t", batch, asked[:4], range(batch + 1, 8), sure=False)

    assert len(computed) == len(set(computed))
    assert sum(mask not in asked[:4] for batch, mask in computed if batch > 1) == 0


def by_work(unit: Unit, rng: np.random.Generator) -> float:
    return float(unit.work)


def test_workers_go_on_with_batches_that_they_have_recorded() -> None:
    crew = SimulatedCrew(4, loss, by_work, record_s=8.0)
    found = dispatcher(crew, unit_timeout_s=1e9)
    search(found, masks(40), 12, sure=True)
    first = crew.recorded
    assert 12 <= first <= 12 + 4
    for count in (39, 38, 37):
        search(found, masks(count), 12, sure=True)
    # A batch that is parted at the end of an ask meets others; none is met by everybody.
    assert crew.recorded <= 30


def test_nothing_waits_behind_a_unit_while_a_worker_idles() -> None:
    slow: list[float] = []

    def seconds(unit: Unit, rng: np.random.Generator) -> float:
        slow.append(unit.work * float(rng.choice([0.5, 1.5])))
        return slow[-1]

    crew = SimulatedCrew(16, loss, seconds)
    search(dispatcher(crew, unit_timeout_s=1e9), masks(200), 16, sure=True)
    idle = 16 * crew.now - crew.busy_s
    # At the end everybody waits for one unit at most, and those are small then.
    assert idle < 16 * max(slow) / 2
    assert crew.busy_s / (16 * crew.now) > 0.9


def test_no_mask_is_computed_twice_where_nobody_dies() -> None:
    computed: list[tuple[int, Mask]] = []

    def evaluate(text: str, batch: int, mask: Mask) -> Answer:
        computed.append((batch, mask))
        return loss(text, batch, mask)

    crew = SimulatedCrew(30, evaluate, lambda unit, rng: float(rng.uniform(0.1, 3)))
    search(dispatcher(crew), masks(60), 7, sure=True)
    assert len(computed) == len(set(computed)) == 7 * 60


def test_a_batch_is_not_recorded_again_for_less_than_that_costs() -> None:
    crew = SimulatedCrew(8, loss, by_work, record_s=8.0)
    found = dispatcher(crew, unit_timeout_s=1e9)
    assert search(found, masks(3), 4, sure=True) == expected(masks(3), 4)
    assert crew.recorded == 4
    # Those who have seen it are gone: somebody else must.
    for worker in list(crew._held)[:4]:
        crew._later(0.0, Lost(worker, "killed"))
    assert search(found, masks(5), 4, sure=True) == expected(masks(5), 4)
    assert crew.recorded > 4


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("always", [True, False])
def test_nothing_waits_for_a_worker_that_never_comes_up(workers: int, always: bool) -> None:
    """The cluster has no room for the last; a mask fails, once or wherever it is tried."""
    asked = masks(32)
    failures = 0

    class Full(SimulatedCrew):
        def start(self, worker: str) -> None:
            if worker != f"w{workers - 1}":
                super().start(worker)

    def fates(worker: str, unit: Unit, rng: np.random.Generator) -> str:
        nonlocal failures
        if asked[19] in unit.masks and (always or not failures):
            failures += 1
            return "failed"
        return "done"

    crew = Full(workers, loss, fate=fates)
    found = dispatcher(crew)
    answers = search(found, asked, 2, sure=True)

    assert list(found.quarantined) == ([asked[19]] if always else [])
    right = expected(asked, 2)
    for row in right:
        row[19] = Answer((), Status.FAILED) if always else row[19]
    assert answers == right
    assert found.ready == workers - 1
    assert crew.now < 1000


def test_a_mask_given_up_on_one_text_is_tried_on_another() -> None:
    asked = masks(8)

    def fates(worker: str, unit: Unit, rng: np.random.Generator) -> str:
        return "hung" if unit.text == "repaired" and asked[3] in unit.masks else "done"

    found = dispatcher(SimulatedCrew(2, loss, fate=fates), unit_timeout_s=50)
    repaired = found.compute("repaired", 0, asked, sure=True)
    assert [answer.status for answer in repaired].count(Status.TIMED_OUT) == 1
    assert found.compute("repaired", 1, asked, sure=True)[3] == Answer((), Status.TIMED_OUT)
    assert found.compute("t", 0, asked, sure=True) == expected(asked, 1)[0]


def test_counts_begin_anew_for_another_run() -> None:
    asked = masks(8)

    def fates(worker: str, unit: Unit, rng: np.random.Generator) -> str:
        return "failed" if unit.batch == 0 and asked[3] in unit.masks else "done"

    found = dispatcher(SimulatedCrew(2, loss, fate=fates))
    search(found, asked, 1, sure=True)
    first = found.state()
    assert first["quarantined"] == [asked[3].key]
    assert first["units_reissued"]

    found.recount()
    found.compute("another", 1, asked, sure=True)
    second = found.state()
    assert second["quarantined"] == []
    assert second["units_reissued"] == 0
    assert 0 < second["units_done"] == sum(worker["units"] for worker in second["workers"])
