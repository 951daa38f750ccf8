"""Writing a journal and replaying one, by the same code.

The search loop commits every record it is about to act on. Over an old journal a commit checks that
the repetition reached the same record; past its end it appends. So a resumed search is the search
run again from the start, with the losses already known read instead of computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from depthsearch.errors import JournalError
from depthsearch.journal import Journal, Record

OnRecord = Callable[[Mapping[str, Any], bool], None]
"""Called with each record, its time stamp included, and whether it is new or a repeated one."""


class Ledger:
    """The journal of one search, replayed as far as it goes and then written on."""

    def __init__(self, journal: Journal, on_record: OnRecord | None = None) -> None:
        self._journal = journal
        self._on_record = on_record or (lambda *_: None)
        self._old = list(journal.records)
        self._place = 0
        self._first: Record | None = next(iter(journal.records), None)

    @property
    def run(self) -> str:
        """What names this run and no other, now and on resume; nothing before the first record."""
        if self._first is None:
            return ""
        # It holds the time as well, so that of two runs of one configuration each has its own.
        return hashlib.sha256(json.dumps(self._first, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def finished(self) -> bool:
        """Whether the search ended before: nothing is going to be appended."""
        return bool(self._old) and self._old[-1].get("op") == "end"

    @property
    def replaying(self) -> bool:
        """Whether the next record is already there."""
        return self._place < len(self._old)

    @property
    def upcoming(self) -> Mapping[str, Any] | None:
        """The record that is there next, None where the journal ends."""
        return self._old[self._place] if self.replaying else None

    def commit(self, record: Mapping[str, Any]) -> None:
        """Append `record`, or check it against the one already there; raises JournalError."""
        if not self.replaying:
            self._append(record)
            return
        old = self._take()
        if old != json.loads(json.dumps(record)):
            raise self._diverged(old, record)
        self._on_record(self._old[self._place - 1], False)

    def recall(self, op: str, compute: Callable[[], Mapping[str, Any]]) -> Record:
        """The record of kind `op`: read if it is there, else computed and appended."""
        if not self.replaying:
            record = compute()
            self._append(record)
            return dict(record)
        old = self._take()
        if old.get("op") != op:
            raise self._diverged(old, {"op": op})
        self._on_record(self._old[self._place - 1], False)
        return old

    def _append(self, record: Mapping[str, Any]) -> None:
        written = self._journal.append(record)
        self._first = self._first or written
        self._on_record(written, True)

    def _take(self) -> Record:
        old = {key: value for key, value in self._old[self._place].items() if key != "time"}
        self._place += 1
        return old

    def _diverged(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> JournalError:
        if old.get("op") == new.get("op") == "start" and old["version"] != new["version"]:
            return JournalError(
                f"{self._journal.path} was written by depthsearch {old['version']}, this is "
                f"{new['version']}: resume it with that version, or start a new run"
            )
        differs = difference(old, json.loads(json.dumps(new)))
        return JournalError(
            f"{self._journal.path}, record {self._place}: repeating the search gives another "
            f"'{new.get('op')}' record than the journal's '{old.get('op')}' (they differ in "
            f"{differs}); the model, the data, the configuration or a library changed since: "
            "restore them, or start a new run"
        )


def difference(old: Any, new: Any, path: str = "") -> str:
    """Where two unequal records part, such as "'signature.threads', 2 before and 1 now"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*new, *old]):
            if old.get(key) != new.get(key):
                below = f"{path}.{key}" if path else str(key)
                return difference(old.get(key), new.get(key), below)
    if isinstance(old, list | Mapping) or isinstance(new, list | Mapping):
        return f"'{path}'"
    return f"'{path}', {old} before and {new} now"
