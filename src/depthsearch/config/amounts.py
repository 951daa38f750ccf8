"""Absolute budgets as people write them: a number with a unit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)")
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS: Mapping[str, Mapping[str, int]] = {
    "params": {"k": 10**3, "m": 10**6, "b": 10**9},
    "bytes": {f"{p}b": f for p, f in _DECIMAL.items()}
    | {f"{p}ib": 1024**n for n, p in enumerate("kmgt", start=1)},
    "flops": {f"{p}flop": f for p, f in _DECIMAL.items()},
    "latency": {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9},
}
_UNIT_NAMES = {
    "params": "K, M or B, such as '100M'",
    "bytes": "B, kB, MB, GB, KiB, MiB or GiB, such as '180MB'",
    "flops": "FLOP, kFLOP, MFLOP, GFLOP or TFLOP (per token), such as '0.2GFLOP'",
    "latency": "ns, us, ms or s, such as '12ms'",
}


def parse_amount(text: str, metric: str) -> int:
    """An absolute cap such as "100M", "180MB", "0.2GFLOP" or "12ms", in the metric's own unit.

    That of latency is the nanosecond. Upper and lower case are one. Raises ValueError, naming the
    units of the metric.
    """
    units = _UNITS[_kind(metric)]
    match = _AMOUNT.fullmatch(text.strip())
    unit = match[2].lower() if match else ""
    if unit not in units:
        unit = unit.removesuffix("s")
    if match is None or unit not in units:
        raise ValueError(f"a cap is a number with a unit: {units_of(metric)}")
    amount = math.floor(float(match[1]) * units[unit])
    if amount < 1:
        raise ValueError("a cap is at least 1")
    return amount


def units_of(metric: str) -> str:
    """The units that a cap of the metric may have, with an example, as errors say it."""
    return _UNIT_NAMES[_kind(metric)]


def _kind(metric: str) -> str:
    return "bytes" if metric == "kv_bytes" else metric
