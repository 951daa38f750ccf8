from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from depthsearch.errors import JournalError
from depthsearch.journal import Journal, read_journal, without_times
from depthsearch.run.ledger import Ledger

START = {"op": "start", "version": "1", "config": {"seed": 0, "limit": None}, "sizes": (1, 2)}
LOSSES = {"op": "tell", "losses": [0.1, 1 / 3]}


def unexpected() -> Mapping[str, Any]:
    raise AssertionError("what is recorded must not be computed again")


def test_the_first_time_writes_and_the_second_reads(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        ledger = Ledger(journal)
        assert not ledger.replaying
        ledger.commit(START)
        assert ledger.recall("tell", lambda: LOSSES)["losses"] == [0.1, 1 / 3]
        assert not ledger.replaying
    written = path.read_bytes()
    with Journal(path) as journal:
        ledger = Ledger(journal)
        assert ledger.replaying
        ledger.commit(START)
        assert ledger.recall("tell", unexpected) == LOSSES
        assert not ledger.replaying
        assert path.read_bytes() == written
        ledger.commit({"op": "end"})
    assert path.read_bytes().startswith(written)
    assert [record["op"] for record in read_journal(path)] == ["start", "tell", "end"]


def test_what_was_computed_is_on_disk_before_it_is_handed_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        ledger = Ledger(journal)
        ledger.commit(START)
        assert len(read_journal(path)) == 1
        found = ledger.recall("tell", lambda: LOSSES)
        assert without_times([found]) == without_times(read_journal(path)[1:])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": "2"}, "written by depthsearch 1, this is 2"),
        ({"config": {"seed": 1, "limit": None}}, r"'config\.seed', 0 before and 1 now"),
        ({"config": {"seed": 0, "limit": 9}}, r"'config\.limit', None before and 9 now"),
        ({"config": {"seed": 0}}, "they differ in 'config'\\)"),
        ({"sizes": (1, 3)}, "they differ in 'sizes'\\)"),
        ({"more": "x"}, "'more', None before and x now"),
    ],
)
def test_another_record_is_refused_with_where_it_differs(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        Ledger(journal).commit(START)
    written = path.read_bytes()
    with Journal(path) as journal, pytest.raises(JournalError, match=message):
        Ledger(journal).commit({**START, **changed})
    assert path.read_bytes() == written


def test_another_kind_of_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        Ledger(journal).commit(START)
    with Journal(path) as journal:
        with pytest.raises(JournalError, match=r"record 1: .*'hints' .*'start'"):
            Ledger(journal).recall("hints", unexpected)
        with pytest.raises(JournalError, match=r"record 1: .*'end' .*'start'"):
            Ledger(journal).commit({"op": "end"})


def test_a_run_has_a_name_that_no_other_has_and_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for number in range(2):
        path = tmp_path / f"{number}.jsonl"
        monkeypatch.setattr("time.time", lambda number=number: 1e9 + number)
        with Journal(path) as journal:
            ledger = Ledger(journal)
            assert ledger.run == ""
            ledger.commit(START)
            names.append(ledger.run)
            ledger.recall("tell", lambda: LOSSES)
            assert ledger.run == names[number]
        for ended in (False, True):
            with Journal(path) as journal:
                ledger = Ledger(journal)
                assert (ledger.run, ledger.finished) == (names[number], ended)
                ledger.commit(START)
                ledger.recall("tell", unexpected)
                ledger.commit({"op": "end"})
    assert len(set(names)) == 2
