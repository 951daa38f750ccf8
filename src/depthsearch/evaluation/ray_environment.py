"""What Ray reads once, when it is imported, and whether its servers still listen."""

from __future__ import annotations

import os
import socket
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


def listens(address: tuple[str, int], timeout_s: float = 1.0) -> bool:
    """Whether somebody accepts connections there; a machine too busy to answer counts as there."""
    try:
        socket.create_connection(address, timeout=timeout_s).close()
    except TimeoutError:
        return True
    except OSError:
        return False
    return True
