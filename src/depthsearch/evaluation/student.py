"""Student's t distribution with whole degrees of freedom, by its finite sums."""

from __future__ import annotations

import math
from functools import lru_cache

_STEPS = 80
_LARGEST = 1e9


def upper_tail(t: float, freedom: int) -> float:
    """The probability of more than `t >= 0` with `freedom >= 1` degrees of freedom.

    (Abramowitz and Stegun, 26.7.3 and 26.7.4.) The error is about 1e-16.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for i in range(odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (i + 1) / (i + 2)
    inner = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 - inner) / 2


@lru_cache(maxsize=4096)
def critical_value(level: float, freedom: int) -> float:
    """What t exceeds with probability `level`, above 1e-12 and at most one half.

    Infinite for fewer degrees of freedom than one.
    """
    if freedom < 1:
        return math.inf
    low, high = 0.0, 1.0
    while upper_tail(high, freedom) > level and high < _LARGEST:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if upper_tail(middle, freedom) > level else (low, middle)
    return high
