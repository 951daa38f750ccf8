"""The journal: one JSON object a line, flushed to disk before anything acts on it.

Records never change once written. A process killed in mid-write leaves a torn last line, which
readers skip and the next writer cuts off. Every record ends with `time`, the only part that differs
between a run and its repetition.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from depthsearch.errors import JournalError, StorageError

Record = dict[str, Any]


def read_journal(path: Path) -> list[Record]:
    """All complete records; a torn last line is left out.

    Raises JournalError for a missing file or a damaged line before the last.
    """
    return _parse(path, _read(path))[0]


def without_times(records: list[Record]) -> str:
    """The journal's text with the time stamps left out: equal for equal runs."""
    return "".join(
        _line({key: value for key, value in record.items() if key != "time"}) for record in records
    )


class Journal:
    """An append-only journal held by one process; a context manager.

    `records` are those found at opening. Raises JournalError if another process holds the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("ab+")
        except OSError as error:
            raise StorageError(f"cannot open {path} for writing: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise JournalError(
                f"{path} is in use by another process: wait for it, or stop it first"
            ) from error
        self.records, whole = _parse(path, _read(path))
        if whole < path.stat().st_size:
            self._file.truncate(whole)

    def append(self, record: Mapping[str, Any]) -> Record:
        """Write one record and wait until it is on disk; raises StorageError (disk full).

        After a failed write the file ends with the last complete record.
        """
        stamped = {**record, "time": round(time.time(), 3)}
        end = os.fstat(self._file.fileno()).st_size
        try:
            self._file.write(_line(stamped).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._abandon(end)
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}; free some space, then "
                f"`depthsearch resume {self.path.parent}`"
            ) from error
        return stamped

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def _abandon(self, end: int) -> None:
        """Drop what is buffered and cut the file at `end`, so that no torn line stays."""
        raw = self._file.detach()
        os.ftruncate(raw.fileno(), end)
        self._file = os.fdopen(os.dup(raw.fileno()), "ab+")
        raw.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"), allow_nan=False, ensure_ascii=False) + "\n"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise JournalError(f"there is no journal at {path}") from error


def _parse(path: Path, data: bytes) -> tuple[list[Record], int]:
    """The complete records and the number of bytes that they take."""
    records: list[Record] = []
    whole = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines) - 1:
                break
            raise JournalError(
                f"{path}, line {number} is not JSON: the journal is damaged there; restore it "
                "from a copy, or start a new run"
            ) from error
        records.append(record)
        whole += len(line) + 1
    return records, whole
