"""Exponents: least squares through the logarithms, and how well they fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """``y = exp(intercept) * x ** slope`` (power law), or ``y = intercept + slope * x`` (line).

    Attributes:
        r_squared: share of the variance (of the logarithms, for a power law) that the fit explains;
            1 where there is no variance to explain.
        first, last: range of x that was used.
    """

    slope: float
    intercept: float
    r_squared: float
    first: float
    last: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Ordinary least squares.

    Raises:
        ValueError: fewer than two different x, or as many y as x are missing.
    """
    if len(x) != len(y) or len(set(x)) < 2:
        raise ValueError(f"a line needs two different places: {list(x)}, {list(y)}")
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    intercept = mean_y - slope * mean_x
    total = sum((b - mean_y) ** 2 for b in y)
    rest = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    r_squared = 1.0 - rest / total if total > 1e-20 * (1 + mean_y**2) else 1.0
    return Fit(slope, intercept, r_squared, min(x), max(x))


def fit_power(x: Sequence[float], y: Sequence[float], *, start: float = 0.0) -> Fit:
    """The exponent of y against x, over x from ``start`` on.

    Raises:
        ValueError: a value that is not positive, or fewer than two different x.
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a >= start]
    if any(a <= 0 or b <= 0 for a, b in pairs):
        raise ValueError(f"a power law is of positive values: {pairs}")
    fit = fit_line([math.log(a) for a, _ in pairs], [math.log(b) for _, b in pairs])
    sizes = [a for a, _ in pairs]
    return Fit(fit.slope, fit.intercept, fit.r_squared, min(sizes), max(sizes))


def crossing(x: Sequence[float], rising: Sequence[float], other: Sequence[float]) -> float | None:
    """Where ``rising`` stops being the smaller of the two, between the points by straight lines
    through the logarithms.

    Returns:
        The place; ``0.0`` if it is never the smaller, None if it still is at the last x.
    """
    gaps = [math.log(a / b) for a, b in zip(rising, other, strict=True)]
    if gaps[-1] < 0:
        return None
    below = [place for place, gap in enumerate(gaps) if gap < 0]
    if not below:
        return 0.0
    at = below[-1]
    share = -gaps[at] / (gaps[at + 1] - gaps[at])
    return math.exp(math.log(x[at]) + share * (math.log(x[at + 1]) - math.log(x[at])))
