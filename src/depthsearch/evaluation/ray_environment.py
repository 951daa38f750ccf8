"""What Ray reads once, when it is imported."""

from __future__ import annotations

import os
import sys


def stay_local() -> None:
    """Have a cluster that this process starts listen on this machine only.

    Ray binds to every interface where more machines could join. Call it before Ray is imported,
    later it does nothing, and not for a cluster of several machines.
    """
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def spare_dumps() -> None:
    """Keep Ray from printing the log of a node's server that died; an error says it in one line.

    Call it before Ray is imported, later it does nothing.
    """
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^Raylet is terminated")
