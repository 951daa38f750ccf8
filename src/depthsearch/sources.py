"""Tell a path from a hub id, and bring what foreign libraries say down to one line."""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARIES = ("transformers", "datasets", "huggingface_hub", "httpx")
"""Loggers that `quiet` lowers: what they report as an error also arrives as an exception."""


def is_path(source: str, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether `source` names something on this machine, so that no hub is asked for it.

    True for what exists, for anything written as a path (`./x`, `~/x`, `/x`, `a/b/c`, `x/`), for a
    name that ends in one of `suffixes`, and for `folder/x` where `folder` exists. A hub id is a
    bare `name` or an `owner/name` with neither.
    """
    if not source or "\\" in source or source.startswith((".", "~", "/")) or source.endswith("/"):
        return True
    if source.lower().endswith(suffixes) or source.count("/") > 1:
        return True
    path = Path(source)
    try:
        return path.exists() or (len(path.parts) == 2 and path.parent.is_dir())
    except OSError:
        # Too long for a hub id, or in a folder without permission.
        return True


def one_line(error: BaseException, limit_chars: int = 300) -> str:
    """The innermost cause of `error` as one line of at most `limit_chars` characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit_chars else text[: limit_chars - 3] + "..."


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, is the operating system out of room for a write."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # how safetensors words it
            return True
        error = error.__cause__
    return False


@contextmanager
def quiet() -> Iterator[None]:
    """Silence advisory log lines and warnings of the model and data libraries, then restore."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
