"""A Ray cluster of several nodes on this machine, none of which listens beyond loopback.

As a script it is a process of its own for those who have imported Ray already, or must not: it
prints one line, JSON with `address` and the process ids of the two nodes' servers as `raylets`,
replaces the dead nodes for every line read, answering with how many, and ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

STORE_BYTES = 80_000_000


class Nodes:
    """A Ray cluster of a head and two nodes with one core each, its files in `folder`.

    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 must be in the environment before Ray is imported, and
    RAY_TMPDIR should be, or else `address=auto` finds this cluster.
    """

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self._options: dict[str, Any] = {
            "node_ip_address": "127.0.0.1",
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            "include_log_monitor": False,
        }
        # Sooner than after Ray's 15 s a node counts as dead, so that runs stay short.
        health = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 3,
        }
        self._cluster = Cluster()
        self._cluster.add_node(
            temp_dir=str(folder), num_cpus=0, _system_config=health, **self._options
        )
        self.address = str(self._cluster.address)
        self._nodes = [self._add() for _ in range(2)]

    @property
    def raylets(self) -> list[int]:
        """The process ids of the nodes' servers."""
        return [node.all_processes["raylet"][0].process.pid for node in self._nodes]

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, **self._options)

    def kill(self, choice: int) -> None:
        """SIGKILL the raylet of one node."""
        self._nodes[choice].all_processes["raylet"][0].process.kill()

    def restore(self) -> int:
        """Start a node for each one that died; returns how many."""
        dead = [
            place
            for place, node in enumerate(self._nodes)
            if node.all_processes["raylet"][0].process.poll() is not None
        ]
        for place in dead:
            self._cluster.remove_node(self._nodes[place], allow_graceful=False)
            self._nodes[place] = self._add()
        return len(dead)

    def close(self) -> None:
        """End the cluster."""
        self._cluster.shutdown()


def main() -> None:
    """Start, serve, stop."""
    with tempfile.TemporaryDirectory(prefix="ds-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_TMPDIR": folder}
        place = Path(folder) / "ray"
        place.mkdir()
        nodes = Nodes(place)
        try:
            _say(json.dumps({"address": nodes.address, "raylets": nodes.raylets}))
            for _ in sys.stdin:
                _say(str(nodes.restore()))
        finally:
            nodes.close()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
