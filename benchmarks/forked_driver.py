"""depthsearch commands in processes that start fast, forked off one with the libraries loaded."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PATIENCE_S = 300.0
PRELOADED = [
    "depthsearch.cli",
    "depthsearch.run.figures",
    "transformers.models.llama.modeling_llama",
]
"""For `multiprocessing.set_forkserver_preload`."""


class Driver:
    """A depthsearch command in a process forked off one that has torch loaded already."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=command, args=(list(arguments), str(log)))
        self._process.start()
        self.began = time.monotonic()

    @property
    def exit(self) -> int | None:
        """The exit code, None while it runs; a signal is negative."""
        return self._process.exitcode

    def below(self) -> list[psutil.Process]:
        """All processes that descend from it."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self._process.join()

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its end; raises TimeoutError."""
        self._process.join(timeout_s)
        if self.exit is None:
            self.kill()
            raise TimeoutError(f"a driver hung: {self.log.read_text(encoding='utf-8')[-500:]}")
        return self.exit


def command(arguments: list[str], log: str) -> None:
    """The body of a driver's process."""
    from depthsearch import cli

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = ["depthsearch", *arguments]
    try:
        cli.main()
    finally:
        # Processes of multiprocessing leave these out, and Ray counts on them.
        atexit._run_exitfuncs()
