"""A Ray cluster of a head and two nodes on loopback, for tests: run as a script.

Prints one line, JSON with `address` and the process ids of the two nodes' servers as `raylets`,
adds a node for every line read, answering with its process id, and ends with its input. A process
of its own, since Ray reads when it is imported that it shall stay on loopback.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    """Start, serve, stop."""
    with tempfile.TemporaryDirectory(prefix="ds-", ignore_cleanup_errors=True) as folder:
        # Here Ray also writes the address that `address=auto` looks for.
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_TMPDIR": folder}
        (Path(folder) / "ray").mkdir()
        from ray.cluster_utils import Cluster

        options: dict[str, Any] = {
            "node_ip_address": "127.0.0.1",
            "object_store_memory": 80_000_000,
            "include_dashboard": False,
            "include_log_monitor": False,
        }
        health = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 3,
        }
        cluster = Cluster()
        try:
            cluster.add_node(temp_dir=f"{folder}/ray", num_cpus=0, _system_config=health, **options)
            raylets = [raylet(cluster.add_node(num_cpus=1, **options)) for _ in range(2)]
            say(json.dumps({"address": cluster.address, "raylets": raylets}))
            for _ in sys.stdin:
                say(str(raylet(cluster.add_node(num_cpus=1, **options))))
        finally:
            cluster.shutdown()


def say(line: str) -> None:
    """Answer at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def raylet(node: Any) -> int:
    """The process id of a node's server."""
    pid = node.all_processes["raylet"][0].process.pid
    assert isinstance(pid, int)
    return pid


if __name__ == "__main__":
    main()
