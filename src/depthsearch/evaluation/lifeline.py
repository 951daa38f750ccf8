"""The servers that the driver of a cluster can't go on without, watched from outside."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from depthsearch.errors import CONTINUED, ClusterError

Address = tuple[str, int]

_EVERY_S = 1.0
_GONE = (
    "{} has died or was killed, and the workers with it; nothing is lost: as soon as there is a "
    f"cluster, {CONTINUED}"
)


class Lifeline:
    """Ray's server on this machine (the raylet), and the one of the cluster (the GCS).

    Ray ends the process of a driver, with nothing but a log, at the next larger object after its
    raylet died, and a minute after the GCS did. So `check` before anything is asked of Ray. What
    can't be reached at the start is not watched: a driver may come through a proxy. `grace_s` is
    how long the GCS may be away, since whoever keeps a cluster may start it again.
    """

    def __init__(
        self,
        node: Address | None,
        control: Address | None,
        grace_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node if node is not None and listens(node) else None
        self._control = control if control is not None and listens(control) else None
        self._grace_s = grace_s
        self._clock = clock
        self._asked = self._heard = clock()

    @property
    def heard(self) -> bool:
        """Whether the GCS was there at the last look; where it wasn't, questions to it block."""
        return self._heard == self._asked

    def check(self, *, now: bool = False) -> None:
        """Raise ClusterError where one is gone; looks once a second, or `now`."""
        time_s = self._clock()
        if not now and time_s - self._asked < _EVERY_S:
            return
        if self._node is not None and not listens(self._node):
            raise ClusterError(_GONE.format("Ray's server on this machine (the raylet)"))
        self._asked = time_s
        if self._control is None or listens(self._control):
            self._heard = time_s
        elif time_s - self._heard >= self._grace_s:
            raise ClusterError(_GONE.format("the head of the Ray cluster (the GCS)"))


def listens(address: Address, timeout_s: float = 1.0) -> bool:
    """Whether somebody accepts connections there; a machine too busy to answer counts as there."""
    try:
        socket.create_connection(address, timeout=timeout_s).close()
    except TimeoutError:
        return True
    except OSError:
        return False
    return True
