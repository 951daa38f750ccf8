from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.run.synthetic import Search
from tests.tiny_runs import SETTINGS

from depthsearch.config import config_from_mapping, resolved_yaml
from depthsearch.errors import JournalError, RunDirectoryError
from depthsearch.journal import Record, read_journal
from depthsearch.run.course import Step
from depthsearch.run.directory import ARMS, BEST, COMPARE, CONFIG, JOURNAL, WORKERS
from depthsearch.run.planning import Plan
from depthsearch.run.watching import (
    PHASES,
    CompareState,
    RunState,
    Watcher,
    Workers,
    rates,
    run_state,
    working_seconds,
)

WORKERS_JSON: dict[str, Any] = {
    "version": 1,
    "time": 1000.0,
    "workers": [
        {"id": "w0", "node": "10.0.0.3", "pid": 1, "state": "busy", "units": 41, "busy_s": 12.3,
         "restarts": 0},
        {"id": "w1", "node": "10.0.0.4", "pid": 2, "state": "dead", "units": 4, "busy_s": 1.0,
         "restarts": 3},
    ],
    "units_done": 45,
    "units_reissued": 2,
    "units_queued": 3,
    "quarantined": ["1101"],
}  # fmt: skip
LIMITS = {"method": "evolution", "seed": 0, "max_evaluations": 60, "cost_tokens": None}


def write_run(run: Path, **search: Any) -> Path:
    """A finished run over a toy space, as `depthsearch search` leaves it."""
    run.mkdir(parents=True)
    config = config_from_mapping({**SETTINGS, "search": LIMITS | search})
    (run / CONFIG).write_text(resolved_yaml(config))
    settings = config.search
    Search(
        run / JOURNAL,
        Plan(settings.method, max_evaluations=settings.max_evaluations, finalists=3),
        start={"version": "0", "signature": {}, "config": config.to_json()},
    ).run()
    (run / BEST).write_text("{}")
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("watched") / "run")


@pytest.fixture(scope="module")
def records(finished: Path) -> list[Record]:
    return read_journal(finished / JOURNAL)


def timed(records: list[Record], seconds: float = 2.0) -> list[Record]:
    """The same records `seconds` apart, from 0."""
    return [{**record, "time": seconds * place} for place, record in enumerate(records)]


def cut(records: list[Record], op: str) -> list[Record]:
    """The records up to the last `op`."""
    last = max(place for place, record in enumerate(records) if record["op"] == op)
    return records[: last + 1]


class TestPhases:
    @pytest.mark.parametrize(
        ("op", "phase"),
        [("start", "started"), ("hints", "searching"), ("ask", "searching"), ("finals", "finals"),
         ("end", "finals")],
    )  # fmt: skip
    def test_by_the_last_record(self, records: list[Record], op: str, phase: str) -> None:
        part = timed(cut(records, op))
        state = run_state("run", part, LIMITS, part[-1]["time"] + 1)
        assert state.phase == phase
        assert not state.over

    def test_nothing_written_yet(self) -> None:
        assert run_state("run", [], LIMITS, 5.0).phase == "started"

    def test_the_last_tell_that_the_limit_allows_starts_the_finals(
        self, records: list[Record]
    ) -> None:
        part = timed(cut(records, "tell"))
        assert run_state("run", part, LIMITS, part[-1]["time"]).phase == "finals"
        unlimited = {**LIMITS, "max_evaluations": None}
        assert run_state("run", part, unlimited, part[-1]["time"]).phase == "searching"
        assert run_state("run", part, unlimited, part[-1]["time"] + 60).phase == "finals"

    def test_done_is_what_has_its_best_mask(self, records: list[Record]) -> None:
        state = run_state("run", records, LIMITS, 0.0, finished=True)
        assert (state.phase, state.over, state.seconds_left) == ("done", True, 0.0)
        assert run_state("run", records, LIMITS, 1e12, finished=True).phase == "done"

    def test_a_long_silence_stalls(self, records: list[Record]) -> None:
        part = timed(cut(records, "ask"))
        last = part[-1]["time"]
        assert run_state("run", part, LIMITS, last + 299).phase == "searching"
        state = run_state("run", part, LIMITS, last + 301)
        assert (state.phase, state.quiet_s, state.seconds_left) == ("stalled", 301.0, None)

    def test_slow_steps_are_waited_for_longer(self, records: list[Record]) -> None:
        part = timed(cut(records, "ask"), seconds=600.0)
        last = part[-1]["time"]
        assert run_state("run", part, LIMITS, last + 19 * 600).phase == "searching"
        assert run_state("run", part, LIMITS, last + 21 * 600).phase == "stalled"

    def test_workers_heard_of_lately_are_no_silence(self, records: list[Record]) -> None:
        part = timed(cut(records, "ask"))
        now = part[-1]["time"] + 1000
        fresh, old = (
            Workers.from_json(WORKERS_JSON | {"time": time}) for time in (now - 1, now - 100)
        )
        assert run_state("run", part, LIMITS, now, workers=fresh).phase == "searching"
        assert run_state("run", part, LIMITS, now, workers=old).phase == "stalled"


class TestFigures:
    def test_what_a_search_has_reached(self, records: list[Record]) -> None:
        part = timed(cut(records, "ask"))
        state = run_state("run", part, LIMITS, part[-1]["time"])
        told = [record for record in part if record["op"] == "tell"]
        assert state.asks == len(told)
        assert state.cost_tokens == told[-1]["cost_tokens"]
        assert state.evaluations == sum(state.statuses.values())
        assert state.evaluations_per_s == pytest.approx(
            sum(len(record["evaluations"]) for record in told[-20:]) / (2.0 * len(told[-20:]))
        )
        assert state.seconds_left == pytest.approx(
            (60 - state.evaluations) / state.evaluations_per_s
        )

    def test_the_tighter_limit_tells_the_time_left(self, records: list[Record]) -> None:
        part = timed(cut(records, "ask"))
        now = part[-1]["time"]
        both = {**LIMITS, "cost_tokens": part[-2]["cost_tokens"] + 1.0}
        loose, tight = (run_state("run", part, limits, now) for limits in (LIMITS, both))
        assert tight.cost_tokens_per_s is not None
        assert tight.seconds_left == pytest.approx(1.0 / tight.cost_tokens_per_s)
        assert loose.seconds_left is not None
        assert tight.seconds_left < loose.seconds_left

    def test_no_limit_no_time_left(self, records: list[Record]) -> None:
        state = run_state("run", timed(cut(records, "ask")), {}, 0.0)
        assert state.seconds_left is None

    def test_json_holds_every_field(self, records: list[Record]) -> None:
        workers = Workers.from_json(WORKERS_JSON)
        data = run_state("run", records, LIMITS, 0.0, workers=workers).to_json()
        assert json.loads(json.dumps(data, allow_nan=False)) == {
            **data,
            "workers": {
                **data["workers"],
                "workers": list(data["workers"]["workers"]),
                "quarantined": ["1101"],
            },
        }
        assert data["phase"] in PHASES
        assert workers.states == {"busy": 1, "dead": 1}

    def test_a_worker_that_starts_has_no_node_yet(self) -> None:
        starting = {"id": "w2", "state": "starting", "units": 0, "busy_s": 0.0, "restarts": 0}
        data = {**WORKERS_JSON, "workers": [*WORKERS_JSON["workers"], starting]}
        assert Workers.from_json(data).workers[-1].node == ""
        assert Workers.from_json(data).states == {"busy": 1, "dead": 1, "starting": 1}


STEPS = st.lists(
    st.builds(
        Step, st.floats(0.5, 2.0), st.integers(1, 8), st.floats(90.0, 110.0)
    ),
    min_size=3,
    max_size=40,
)  # fmt: skip


class TestRates:
    @given(STEPS, st.data())
    def test_a_pause_does_not_change_them(self, steps: list[Step], data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(steps) - 1))
        pause = data.draw(st.floats(1e3, 1e7))
        slow = Step(steps[place].seconds + pause, steps[place].evaluations, 100.0)
        others = [step for n, step in enumerate(steps) if n != place and n >= len(steps) - 20]
        rate, cost_rate = rates([*steps[:place], slow, *steps[place + 1 :]])
        assert rate is not None
        assert cost_rate is not None
        each = [step.evaluations / step.seconds for step in others]
        assert min(each) * 0.999 <= rate <= max(each) * 1.001
        each = [step.cost_tokens / step.seconds for step in others]
        assert min(each) * 0.999 <= cost_rate <= max(each) * 1.001

    def test_a_pause_is_left_out_exactly(self) -> None:
        steady = [Step(2.0, 4, 100.0)] * 10
        assert rates([*steady, Step(7200.0, 4, 100.0)]) == rates(steady) == (2.0, 50.0)

    def test_long_steps_that_cost_more_stay(self) -> None:
        assert rates([Step(1.0, 4, 100.0)] * 3 + [Step(20.0, 4, 2000.0)])[1] == pytest.approx(100.0)

    def test_only_the_recent_steps_count(self) -> None:
        assert rates([Step(1.0, 1, 10.0)] * 50 + [Step(1.0, 2, 20.0)] * 20) == (2.0, 20.0)

    def test_nothing_yet(self) -> None:
        assert rates([]) == rates([Step(0.0, 1, 1.0)]) == (None, None)


class TestWatcher:
    def test_a_finished_run(self, finished: Path) -> None:
        state = Watcher(finished).look()
        assert isinstance(state, RunState)
        assert (state.run, state.phase, state.method) == ("run", "done", "evolution")
        assert state.finals_loss is not None

    def test_nothing_is_written_or_locked(self, finished: Path, tmp_path: Path) -> None:
        """Another process may hold the journal's lock, and the directory may be read-only."""
        from depthsearch.journal import Journal

        before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
        with Journal(finished / JOURNAL):
            Watcher(finished).look()
        watcher = Watcher(finished)
        watcher.look()
        with Journal(finished / JOURNAL):
            pass
        assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before

    def test_a_torn_last_line(self, finished: Path, tmp_path: Path) -> None:
        run = tmp_path / "torn"
        run.mkdir()
        (run / CONFIG).write_bytes((finished / CONFIG).read_bytes())
        data = (finished / JOURNAL).read_bytes()
        (run / JOURNAL).write_bytes(data[: len(data) * 2 // 3])
        state = Watcher(run).look(0.0)
        assert isinstance(state, RunState)
        assert state.phase == "searching"

    def test_it_follows_a_journal_that_grows(self, finished: Path, tmp_path: Path) -> None:
        run = tmp_path / "growing"
        run.mkdir()
        (run / CONFIG).write_bytes((finished / CONFIG).read_bytes())
        (run / JOURNAL).touch()
        watcher = Watcher(run)
        seen = []
        for line in (finished / JOURNAL).read_bytes().splitlines(keepends=True):
            state = watcher.look(0.0)
            assert isinstance(state, RunState)
            assert state.max_evaluations == 60
            seen.append(state.asks)
            with (run / JOURNAL).open("ab") as file:
                file.write(line)
        assert seen == sorted(seen)
        assert seen[-1] > 3

    def test_workers_are_read_where_there_are_some(self, finished: Path, tmp_path: Path) -> None:
        run = tmp_path / "workers"
        run.mkdir()
        for name in (CONFIG, JOURNAL):
            (run / name).write_bytes((finished / name).read_bytes())
        watcher = Watcher(run)
        for text in (json.dumps(WORKERS_JSON), "{", "[]", json.dumps({"version": 2})):
            (run / WORKERS).write_text(text)
            state = watcher.look()
            assert isinstance(state, RunState)
            assert (state.workers is not None) == (text == json.dumps(WORKERS_JSON))
        (run / WORKERS).write_text(json.dumps(WORKERS_JSON))
        state = watcher.look()
        assert isinstance(state, RunState)
        assert state.workers is not None
        assert state.workers.workers[0].node == "10.0.0.3"
        assert state.workers.quarantined == ("1101",)

    @pytest.mark.parametrize("missing", [CONFIG, JOURNAL])
    def test_what_is_no_run_directory(self, finished: Path, tmp_path: Path, missing: str) -> None:
        run = tmp_path / "half"
        run.mkdir()
        for name in {CONFIG, JOURNAL} - {missing}:
            (run / name).write_bytes((finished / name).read_bytes())
        with pytest.raises(RunDirectoryError, match=f"has no {missing}"):
            Watcher(run)
        with pytest.raises(RunDirectoryError, match="there is no run directory"):
            Watcher(tmp_path / "nowhere")
        with pytest.raises(RunDirectoryError, match="not a run directory"):
            Watcher(tmp_path)

    def test_files_of_something_else(self, finished: Path, tmp_path: Path) -> None:
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        (foreign / CONFIG).write_text("optimizer: {lr: 0.1}\n")
        with pytest.raises(RunDirectoryError, match="has no journal"):
            Watcher(foreign)
        (foreign / JOURNAL).write_text('{"op": "login", "time": 1}\n')
        with pytest.raises(RunDirectoryError, match="not the journal of a search"):
            Watcher(foreign).look()
        for start in ("", ', "config": 1', ', "config": {}'):
            (foreign / JOURNAL).write_text(f'{{"op": "start", "time": 1{start}}}\n')
            with pytest.raises(RunDirectoryError, match="is damaged, or was written"):
                Watcher(foreign).look()
        (foreign / JOURNAL).write_text("no json\n{}\n")
        with pytest.raises(JournalError, match="line 1"):
            Watcher(foreign).look()


def test_a_comparison_shows_each_of_its_runs(tmp_path: Path) -> None:
    out = tmp_path / "arms"
    compare = {"arms": {"a": {"method": "evolution"}, "b": {"method": "windows"}}, "seeds": [0, 4]}
    write_run(out / ARMS / "a-seed0")
    (out / CONFIG).write_text(resolved_yaml(config_from_mapping({**SETTINGS, "compare": compare})))
    watcher = Watcher(out)
    state = watcher.look()
    assert isinstance(state, CompareState)
    assert [(run.run, run.phase) for run in state.runs] == [
        ("a-seed0", "done"),
        ("b-seed0", "waiting"),
        ("a-seed4", "waiting"),
        ("b-seed4", "waiting"),
    ]
    assert not state.over
    (out / COMPARE).write_text("{}")
    state = watcher.look()
    assert state.over
    assert [run["phase"] for run in state.to_json()["runs"]] == ["done", *["failed"] * 3]


def test_what_a_run_worked_is_told_from_the_pause_before_it_went_on() -> None:
    ends = [(0, "start", 0), (10, "hints", 100), (11, "ask", 100), (31, "tell", 300)]
    ends += [(32, "ask", 300), (52, "tell", 500), (53, "ask", 500), (73, "tell", 700)]
    records: list[Record] = [
        {"op": op, "time": float(time), "cost_tokens": float(cost)} for time, op, cost in ends
    ]
    assert working_seconds(records) == 73
    for place in range(1, len(records)):
        later = [{**r, "time": r["time"] + 40_000} for r in records[place:]]
        assert working_seconds([*records[:place], *later]) == pytest.approx(73, abs=1.01)
    assert working_seconds(records[:1]) == working_seconds([]) == 0


def test_a_comparison_at_several_budgets_names_them(tmp_path: Path) -> None:
    out = tmp_path / "arms"
    compare = {
        "arms": {"a": {"method": "windows"}},
        "seeds": [4],
        "budgets": [{"keep_params": 0.9}, {"keep_kv_bytes": 0.5}],
    }
    write_run(out / ARMS / "a-keep_kv_bytes-0.5-seed4")
    (out / CONFIG).write_text(resolved_yaml(config_from_mapping({**SETTINGS, "compare": compare})))
    state = Watcher(out).look()
    assert isinstance(state, CompareState)
    assert [(run.run, run.phase) for run in state.runs] == [
        ("a-keep_params-0.9-seed4", "waiting"),
        ("a-keep_kv_bytes-0.5-seed4", "done"),
    ]


def test_watching_needs_no_torch(finished: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import depthsearch.live; "
        "from depthsearch.run.watching import Watcher; "
        f"depthsearch.live.show(Watcher(Path({str(finished)!r})).look()); "
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("run: done")
