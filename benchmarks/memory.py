"""Peak memory of a search beside that of just loading and running the dense model.

    python benchmarks/memory.py CONFIG [--set key=value ...] [--out FILE]

Runs `depthsearch search CONFIG` in a process of its own with few masks but all calibration tokens,
and the dense model in another, and compares the most memory that each held. Prints one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from depthsearch import __version__
from depthsearch.config import load_config


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    config = load_config(chosen.config, chosen.overrides)
    dense = peak_bytes(
        "from depthsearch.model.load import load_model; import torch\n"
        f"loaded = load_model({config.model.path!r}, {config.model.dtype!r})\n"
        "with torch.no_grad():\n"
        f"    loaded.model(input_ids=torch.zeros((1, {config.calibration.window_tokens}), "
        "dtype=torch.long), use_cache=False, logits_to_keep=1)\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        overrides = "".join(f", '--set', {text!r}" for text in chosen.overrides)
        search = peak_bytes(
            "import sys; from depthsearch.cli import main\n"
            f"sys.argv = ['depthsearch', 'search', {str(chosen.config)!r}, '--out', "
            f"{str(out)!r}{overrides}]\nmain()\n"
        )
        best = json.loads((out / "best.json").read_text())
    result: dict[str, Any] = {
        "benchmark": "memory",
        "signature": best["signature"] | {"depthsearch": __version__},
        "select_tokens": config.calibration.select_tokens,
        "finals_tokens": config.calibration.finals_tokens,
        "evaluations": best["evaluations"],
        "dense_peak_bytes": dense,
        "search_peak_bytes": search,
        "search_over_dense_bytes": search - dense,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n")


def peak_bytes(code: str) -> int:
    """The largest resident set, VmHWM, of a Python process that runs `code`."""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while child.poll() is None:
            try:
                status = Path(f"/proc/{child.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                if line.startswith("VmHWM:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if child.wait() != 0:
        raise SystemExit(f"the measured process failed with exit code {child.returncode}")
    watcher.join()
    return peak


if __name__ == "__main__":
    main()
