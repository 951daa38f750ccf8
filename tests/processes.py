"""depthsearch commands in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def start_command(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Starts a command that Ctrl-C reaches.

    Where the tests run in the background, a shell has them and their children ignore it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "depthsearch.cli", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
