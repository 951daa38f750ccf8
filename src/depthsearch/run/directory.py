"""Run directories: made whole or not at all, never overwritten."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from depthsearch.errors import RunDirectoryError, StorageError

CONFIG = "config.yaml"
JOURNAL = "journal.jsonl"
BEST = "best.json"
REPAIR = "repair.safetensors"
"""The refitted weights of the best mask, where the search repairs."""
FRONT = "front.json"
"""The answer at each of several budgets, where the search serves them."""
OVERFIT = "overfit.json"
"""Losses of the repaired mask against the amount of fit text, where they were measured."""
REPORT = "report.html"
WORKERS = "workers.json"
"""Where the workers of a cluster stand; for watchers, and no part of the result."""
COMPARE = "compare.json"
CALIBRATION = "calibration.json"
"""What a finished calibration check found."""
CALIBRATION_JOURNAL = "calibration.jsonl"
"""What a calibration check knows so far, a record for each batch of each text."""
ARMS = "arms"


def occupied(path: Path) -> bool:
    """Whether something is at `path`, be it a link to what is gone.

    Raises StorageError where that can't be told.
    """
    try:
        return path.exists() or path.is_symlink()
    except OSError as error:
        raise StorageError(f"cannot look at {path}: {error.strerror or error}") from error


def check_run_directory(path: Path) -> None:
    """Raise RunDirectoryError unless `path` is the directory of one search."""
    for name in (CONFIG, JOURNAL):
        if not (path / name).is_file():
            what = "a comparison" if (path / ARMS).is_dir() else "not a run directory"
            raise RunDirectoryError(
                f"{path} is {what}: it has no {name}; give the --out of `depthsearch search`, or "
                f"one of the folders in {ARMS}/ of a comparison"
            )


def create_directory(path: Path, files: Mapping[str, str]) -> None:
    """Make `path` with `files` (name -> text) in it, under a temporary name and then renamed.

    Raises RunDirectoryError if `path` exists, StorageError if it cannot be written.
    """
    if occupied(path):
        hint = (
            f"continue it with `depthsearch resume {path}`, or choose another --out"
            if occupied(path / JOURNAL)
            else "choose another --out"
        )
        raise RunDirectoryError(f"{path} exists already and is never overwritten: {hint}")
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        for name, text in files.items():
            _write_synced(partial / name, text)
        partial.chmod(0o755)
        partial.rename(path)
    except OSError as error:
        raise StorageError(f"cannot create {path}: {error.strerror or error}") from error
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a whole file or nothing; raises StorageError (disk full)."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        _write_synced(partial, text)
        partial.replace(path)
    except OSError as error:
        # Where nothing could be written, nothing can be removed either.
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON document as `write_file` does."""
    write_file(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON document of a run directory; raises RunDirectoryError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunDirectoryError(f"{path.parent} has no {path.name}: {what}") from error
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise RunDirectoryError(f"{path} is not a JSON object")
    return data


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Bring what a file that holds something else than expected raises down to one line.

    Raises RunDirectoryError with `path` in place of whatever reading plain data ends in.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunDirectoryError(
            f"{path} is damaged, or was written by another version of depthsearch ({error!r})"
        ) from error


def sections(compare: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a compare.json says budget by budget, each with what they share.

    With one budget the document is its only section.
    """
    parts = compare.get("budgets")
    if parts is None:
        return [dict(compare)]
    return [{"dense": compare["dense"], "sites": compare["sites"], **part} for part in parts]


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
