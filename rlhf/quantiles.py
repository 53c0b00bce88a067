"""Quantiles of Student's t, for the intervals of `rlhf.intervals` and of regressions."""

from __future__ import annotations

import math
from statistics import NormalDist


def student_quantile(probability: float, degrees: int) -> float:
    """Compute the quantile of Student's t with whole degrees of freedom, for probabilities from 0.5 to 1.

    Below 30 degrees by bisection of its distribution (Abramowitz and Stegun 26.7.3 and 26.7.4), from there on by the
    expansion 26.7.5, which is exact to six digits there.
    """
    if degrees < 30:
        low, high = 0.0, 1e6
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if _student_distribution(middle, degrees) < probability else (low, middle)
        return (low + high) / 2
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def _student_distribution(t: float, degrees: int) -> float:
    angle = math.atan(t / math.sqrt(degrees))
    sine, squared = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term, series = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, degrees, 2):  # cos + 2/3 cos^3 + 2/3 4/5 cos^5 ..., or 1 + 1/2 cos^2 + 1/2 3/4 cos^4 ...
        series += term
        term *= squared * k / (k + 1)
    within = 2 / math.pi * (angle + sine * series) if odd else sine * series
    return 0.5 + within / 2
