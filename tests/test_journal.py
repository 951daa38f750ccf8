from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from depthsearch.errors import JournalError, StorageError
from depthsearch.journal import Journal, read_journal, without_times

RECORDS: list[dict[str, Any]] = [
    {"op": "start", "version": "0.1.0", "config": {"path": "/größe/✂"}},
    {"op": "ask", "id": 0, "proposals": ["1101", "0111"]},
    {"op": "tell", "id": 0, "losses": [0.1, 1 / 3, 5e-324], "none": None},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def write(path: Path, records: list[dict[str, Any]] = RECORDS) -> bytes:
    with Journal(path) as journal:
        for record in records:
            journal.append(record)
    return path.read_bytes()


def plain(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "time"} for record in records]


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_records_come_back_in_order_with_the_time_last(path: Path) -> None:
    data = write(path)
    assert data.endswith(b"\n")
    assert len(data.splitlines()) == len(RECORDS)
    assert plain(read_journal(path)) == RECORDS
    for line in data.splitlines():
        record = json.loads(line)
        assert list(record)[-1] == "time"
        assert isinstance(record["time"], float)


def test_an_opened_journal_holds_the_old_records_and_appends_to_them(path: Path) -> None:
    before = write(path)
    with Journal(path) as journal:
        assert plain(journal.records) == RECORDS
        stamped = journal.append({"op": "end"})
    assert path.read_bytes().startswith(before)
    assert read_journal(path)[-1] == stamped


def test_without_times_differs_only_by_contents(path: Path, tmp_path: Path) -> None:
    write(path)
    later = tmp_path / "later.jsonl"
    later.write_text(re.sub(r'"time":[0-9.]+', '"time":1.5', path.read_text()))
    assert later.read_bytes() != path.read_bytes()
    assert without_times(read_journal(later)) == without_times(read_journal(path))
    assert "time" not in without_times(read_journal(path))
    changed = [*RECORDS[:2], {**RECORDS[2], "id": 1}]
    assert without_times(changed) != without_times(RECORDS)


def test_every_float_makes_the_round_trip_exactly(path: Path) -> None:
    rng = random.Random(0)
    values = [math.ldexp(rng.random() - 0.5, rng.randrange(-1000, 1000)) for _ in range(2000)]
    values += [0.0, -0.0, 5e-324, 1.7976931348623157e308, 0.1 + 0.2, 1e16, 1e22]
    write(path, [{"op": "tell", "losses": values}])
    (record,) = read_journal(path)
    assert [x.hex() for x in record["losses"]] == [x.hex() for x in values]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_and_nothing_is_written(
    path: Path, value: float
) -> None:
    before = write(path)
    with Journal(path) as journal, pytest.raises(JournalError, match=r"'tell'.*finite"):
        journal.append({"op": "tell", "losses": [0.5, value]})
    assert path.read_bytes() == before


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_line_with_a_value_that_is_not_finite_is_damage(path: Path, constant: str) -> None:
    lines = write(path).splitlines(keepends=True)
    lines[1] = b'{"op":"ask","id":%s,"time":1}\n' % constant.encode()
    path.write_bytes(b"".join(lines))
    with pytest.raises(JournalError, match="line 2"):
        read_journal(path)


def test_a_tail_torn_at_any_byte_is_left_out_and_then_cut(path: Path) -> None:
    whole = write(path)
    kept = len(b"".join(whole.splitlines(keepends=True)[:2]))
    for length in range(kept, len(whole)):
        path.write_bytes(whole[:length])
        assert plain(read_journal(path)) == RECORDS[:2]
        assert path.stat().st_size == length, "reading must not change the file"
        with Journal(path) as journal:
            assert plain(journal.records) == RECORDS[:2]
        assert path.read_bytes() == whole[:kept]
    write(path, RECORDS[2:])
    assert plain(read_journal(path)) == RECORDS


def test_a_last_line_of_garbage_is_cut_too(path: Path) -> None:
    whole = write(path)
    path.write_bytes(whole + b"\0\0\xff\0\n")
    assert plain(read_journal(path)) == RECORDS
    Journal(path).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        b"{]",
        b"\xff\xfe",
        b"",
        b"5",
        b'["op"]',
        b"null",
        b"{}",
        b'{"op":"end"}',
        b'{"op":1,"time":2}',
    ],
)
@pytest.mark.parametrize("line", [1, 2])
def test_damage_before_the_last_line_is_refused_with_its_place(
    path: Path, damage: bytes, line: int
) -> None:
    lines = write(path).splitlines(keepends=True)
    lines[line - 1] = damage + b"\n"
    damaged = b"".join(lines)
    path.write_bytes(damaged)
    with pytest.raises(JournalError, match=rf"{re.escape(str(path))}, line {line} .*damaged"):
        read_journal(path)
    with pytest.raises(JournalError, match=f"line {line}"):
        Journal(path)
    assert path.read_bytes() == damaged, "a damaged journal must stay as it is"
    path.write_bytes(b"".join(lines[line:]))
    Journal(path).close()  # the refusal has released the file


def test_damage_followed_by_a_torn_tail_is_still_damage(path: Path) -> None:
    lines = write(path).splitlines(keepends=True)
    path.write_bytes(lines[0] + b"garbage\n" + lines[2][:-5])
    with pytest.raises(JournalError, match="line 2"):
        read_journal(path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal at"):
        read_journal(tmp_path / "journal.jsonl")
    with pytest.raises(StorageError, match="cannot read"):
        read_journal(tmp_path)
    with pytest.raises(StorageError, match="cannot open"):
        Journal(tmp_path / "missing" / "journal.jsonl")
    with pytest.raises(StorageError, match="cannot open"):
        Journal(tmp_path)


def test_a_second_process_is_refused_until_the_first_is_gone(path: Path) -> None:
    write(path)
    code = """
        import sys
        from pathlib import Path
        from depthsearch.journal import Journal
        with Journal(Path(sys.argv[1])):
            print("held", flush=True)
            sys.stdin.read()
    """
    with python(code, str(path)) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(JournalError, match="in use by another process"):
            Journal(path)
        assert plain(read_journal(path)) == RECORDS, "reading needs no lock"
        holder.kill()
    Journal(path).close()


def test_a_journal_is_held_once_within_a_process_too(path: Path) -> None:
    with Journal(path), pytest.raises(JournalError, match="in use"):
        Journal(path)
    Journal(path).close()


def test_a_full_disk_leaves_no_torn_line_and_the_journal_usable(path: Path) -> None:
    write(path)
    code = """
        import json, resource, sys
        from pathlib import Path
        from depthsearch.errors import StorageError
        from depthsearch.journal import Journal
        path = Path(sys.argv[1])
        limit = path.stat().st_size + 300
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        with Journal(path) as journal:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            failed = ""
            try:
                journal.append({"op": "tell", "losses": [0.123456789] * 1000})
            except StorageError as error:
                failed = str(error)
            torn = path.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            journal.append({"op": "end"})
        print(json.dumps({"failed": failed, "size": torn}))
    """
    before = path.stat().st_size
    with python(code, str(path)) as writer:
        output, problems = writer.communicate()
    assert problems == ""
    found = json.loads(output)
    assert found["failed"].startswith(f"cannot write {path}: File too large; free some space")
    assert f"depthsearch resume {path.parent}" in found["failed"]
    assert found["size"] == before
    assert plain(read_journal(path)) == [*RECORDS, {"op": "end"}]
