"""The journal: one JSON object a line, flushed to disk before anything acts on it.

Records never change once written. A process killed in mid-write leaves a torn last line, which
readers skip and the next writer cuts off. Every record ends with `time`, the only part that differs
between a run and its repetition.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from depthsearch.errors import DepthsearchError, JournalError, StorageError

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

    `records` are those found at opening. Raises JournalError if another process holds the file or
    a line before the last is damaged, StorageError if it can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # A plain descriptor: a buffered file tries to write again what a full disk refused.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags, 0o666)
        except OSError as error:
            raise StorageError(f"cannot open {path} for writing: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.records, whole = _parse(path, _read(path))
            if whole < os.fstat(self._file).st_size:
                os.ftruncate(self._file, whole)
        except BlockingIOError as error:
            self.close()
            raise JournalError(
                f"{path} is in use by another process: wait for it, or stop it first"
            ) from error
        except OSError as error:
            self.close()
            raise StorageError(f"cannot lock or repair {path}: {error.strerror}") from error
        except DepthsearchError:
            self.close()
            raise

    def append(self, record: Mapping[str, Any]) -> Record:
        """Write one record and wait until it is on disk; raises StorageError (disk full).

        After a failed write the file ends with the last complete record. Raises JournalError,
        nothing written, for a record that JSON can't hold, such as a loss that is not finite.
        """
        stamped = {**record, "time": round(time.time(), 3)}
        try:
            rest = memoryview(_line(stamped).encode())
        except ValueError as error:
            raise JournalError(
                f"{self.path}: the '{record.get('op')}' record can't be written as JSON ({error}): "
                "every figure in it must be finite"
            ) from error
        end = os.fstat(self._file).st_size
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            # Where even this fails, the next one to open the file cuts the torn line.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, end)
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}; free some space, then "
                f"`depthsearch resume {self.path.parent}`; a comparison or a calibration check "
                "goes on with the same command"
            ) from error
        return stamped

    def close(self) -> None:
        """Release the file; may be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

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
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def _parse(path: Path, data: bytes) -> tuple[list[Record], int]:
    """The complete records and the number of bytes that they take."""
    records: list[Record] = []
    whole = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = _record(line)
        except ValueError as error:
            if number == len(lines) - 1 and not lines[-1]:
                break
            raise JournalError(
                f"{path}, line {number} is no record of a journal: it is damaged; restore "
                "it from a copy, or start a new run"
            ) from error
        records.append(record)
        whole += len(line) + 1
    return records, whole


def _record(line: bytes) -> Record:
    """One line parsed; raises ValueError unless it is an object with `op` and `time`, in JSON."""
    record = json.loads(line.decode(), parse_constant=_refused)
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} where an object is wanted")
    if not isinstance(record.get("op"), str) or not _is_number(record.get("time")):
        raise ValueError("no record: 'op' or 'time' is missing or of the wrong type")
    return record


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")
