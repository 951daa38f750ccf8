from __future__ import annotations

import math

import numpy as np
import pytest

from depthsearch.evaluation.student import critical_value, upper_tail


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.0, 50.0])
def test_the_closed_forms_of_few_degrees_of_freedom(t: float) -> None:
    assert upper_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-15)
    assert upper_tail(t, 2) == pytest.approx((1 - t / math.sqrt(2 + t * t)) / 2, abs=1e-15)


@pytest.mark.parametrize("freedom", [3, 4, 7, 10, 31, 64])
@pytest.mark.parametrize("t", [0.5, 2.0, 5.0])
def test_the_tail_is_the_integral_of_the_density(t: float, freedom: int) -> None:
    """Substituting x = t + u / (1 - u) makes the range finite."""
    u = (np.arange(200_000) + 0.5) / 200_000
    x = t + u / (1 - u)
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = math.exp(scale) / math.sqrt(freedom * math.pi)
    density = density * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    assert upper_tail(t, freedom) == pytest.approx(np.mean(density / (1 - u) ** 2), rel=1e-6)


@pytest.mark.parametrize(
    ("level", "freedom", "value"),
    [(0.025, 10, 2.228139), (0.05, 1, 6.313752), (0.005, 3, 5.840909), (0.0005, 7, 5.407883)],
)
def test_values_from_printed_tables(level: float, freedom: int, value: float) -> None:
    assert critical_value(level, freedom) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("freedom", [1, 2, 5, 40, 999])
@pytest.mark.parametrize("level", [0.3, 0.01, 1e-5, 1e-7])
def test_a_critical_value_undoes_the_tail(level: float, freedom: int) -> None:
    assert upper_tail(critical_value(level, freedom), freedom) == pytest.approx(level, rel=1e-6)


def test_without_a_degree_of_freedom_nothing_is_critical() -> None:
    assert critical_value(0.1, 0) == math.inf
