"""A directory that appears whole or not at all."""

from __future__ import annotations

import errno
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from depthsearch.errors import ExportError, StorageError
from depthsearch.sources import is_disk_full, one_line

MANIFEST = "depthsearch.json"
"""Written last: a directory that holds it is a complete export."""


def check_target(out: Path, overwrite: bool) -> None:
    """Raise ExportError where `out` can't be written, before any work is done.

    `overwrite` replaces an earlier export only, never a directory that holds something else. Raises
    StorageError where it can't be looked at.
    """
    try:
        _check_target(out, overwrite)
    except OSError as error:
        raise _storage_error(out, error) from error


def _check_target(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        if not any(out.iterdir()):
            return
        if not overwrite:
            raise ExportError(f"{out} exists and is not empty: choose another name or overwrite it")
        if not (out / MANIFEST).is_file():
            raise ExportError(
                f"{out} is not an export of depthsearch (it has no {MANIFEST}), so it is not "
                "overwritten: choose another name"
            )
    elif out.exists() or out.is_symlink():
        raise ExportError(f"{out} is a file: choose the name of a directory")


@contextmanager
def staged(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new directory beside `out` that takes its name at the end.

    On any error, Ctrl-C included, it is removed with everything in it, and so are the parents made
    for it. Raises ExportError as `check_target` does, StorageError where the system refuses a
    write.
    """
    check_target(out, overwrite)
    missing = [parent for parent in out.parents if not parent.exists()]
    temporary = _beside(out, "tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _replace(temporary, out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            try:
                parent.rmdir()
            except OSError:
                break
        if isinstance(error, OSError | SafetensorError):
            raise _storage_error(out, error) from error
        raise


def set_aside(directory: Path, out: Path) -> Path:
    """Keep what failed its check as `<out>.failed`, or beside what has that name already."""
    failed = out.with_name(f"{out.name}.failed")
    return directory.rename(_beside(out, "failed") if failed.exists() else failed)


def require_room(out: Path, needed_bytes: int) -> None:
    """Raise StorageError where the disk that will hold `out` has less than `needed_bytes` free."""
    place = next(parent for parent in (out, *out.parents) if parent.exists())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise StorageError(
            f"{out} needs {_megabytes(needed_bytes)}, but its disk has {_megabytes(free_bytes)} "
            "free: free some space or choose another disk"
        )


def _beside(out: Path, purpose: str) -> Path:
    return out.with_name(f"{out.name}.{purpose}-{secrets.token_hex(4)}")


def _replace(temporary: Path, out: Path) -> None:
    if not out.is_dir():
        temporary.rename(out)
        return
    old = _beside(out, "old")
    try:
        out.rename(old)
        temporary.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _storage_error(out: Path, error: BaseException) -> StorageError:
    if is_disk_full(error):
        return StorageError(f"{out}: the disk is full; free some space or choose another disk")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{out}: writing is not permitted there; choose another directory")
    return StorageError(f"{out}: can't be written ({one_line(error)})")


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"
