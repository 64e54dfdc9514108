"""Percentiles, bootstrap intervals and paired ratios: every figure of a report comes through here.

Pure and seeded: the same values give the same interval.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000

# Student's t, quantile 0.975, for 1 to 30 degrees of freedom.
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

Statistic = Callable[[np.ndarray], np.ndarray]
"""From samples of shape (resamples, n) to one value a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval and the number of values it comes from."""

    value: float
    low: float
    high: float
    count: int

    def covers(self, value: float) -> bool:
        """Whether the interval leaves `value` possible."""
        return self.low <= value <= self.high


def mean_of(samples: np.ndarray) -> np.ndarray:
    """The mean of each row."""
    return np.asarray(samples.mean(axis=-1))


def percentile_of(percent: float) -> Statistic:
    """A statistic: the percentile of each row, linear between the two nearest values."""
    return lambda samples: np.asarray(np.percentile(samples, percent, axis=-1))


def estimate(values: Sequence[float], statistic: Statistic, seed: int = 0) -> Estimate:
    """The statistic of `values` (at least one) with a percentile-bootstrap interval."""
    array = np.asarray(values, dtype=float)
    random = np.random.default_rng(seed)
    drawn = random.integers(0, len(array), size=(RESAMPLES, len(array)))
    spread = statistic(array[drawn])
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(spread, [tail, 100 - tail])
    return Estimate(value=float(statistic(array[None, :])[0]), low=float(low), high=float(high), count=len(array))


def paired_ratio(pairs: Sequence[tuple[float, float]]) -> Estimate:
    """Geometric mean of second/first over the pairs (values above 0), with a t interval on the logarithms.

    One pair has no spread to judge by: its interval is from 0 to infinity.
    """
    logs = np.log([second / first for first, second in pairs])
    centre = float(logs.mean())
    if len(logs) < 2:
        return Estimate(value=math.exp(centre), low=0.0, high=math.inf, count=len(logs))
    half = t_quantile(len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    return Estimate(value=math.exp(centre), low=math.exp(centre - half), high=math.exp(centre + half), count=len(logs))


def t_quantile(degrees: int) -> float:
    """Two-sided 95 % of Student's t; past 30 degrees the normal's with its first correction."""
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    # Cornish-Fisher: t = z + (z^3 + z) / (4 df)
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees)
