"""Numbers over seeds: mean, spread, interval; nothing is averaged over silently."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
"""The 0.975 quantile of Student's t for 1 to 30 degrees of freedom."""
NORMAL = 1.959964
"""The same quantile of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values. `half` is half the width of the 95 % t interval, None for a single value."""

    mean: float
    std: float | None
    n: int
    half: float | None


def half_width(standard_error: float, n: int) -> float:
    """Half of the 95 % t interval of a mean of `n` >= 2 values."""
    freedom = n - 1
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1] * standard_error
    # Cornish and Fisher's expansion in 1 / freedom: good to three decimals here.
    first = (NORMAL**3 + NORMAL) / 4
    second = (5 * NORMAL**5 + 16 * NORMAL**3 + 3 * NORMAL) / 96
    return (NORMAL + first / freedom + second / freedom**2) * standard_error


def over_seeds(values: Iterable[float]) -> Estimate | None:
    """The estimate of some seeds' finite values, None of none. One value has no spread and no interval."""
    known = list(values)
    if not known:
        return None
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Estimate(mean, None, 1, None)
    # not `statistics.stdev`, which adds fractions: a large store asks for thousands of these
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1))
    return Estimate(mean, std, len(known), half_width(std / math.sqrt(len(known)), len(known)))


def difference(
    of: Mapping[int, float], to: Mapping[int, float], *, one_of: bool = False, one_to: bool = False
) -> Estimate | None:
    """Mean of `of` minus `to`, both by seed; the seam for tests on per-item results.

    A side that was planned with one seed (`one_of`, `one_to`) is a constant, set against every seed of the other. Else
    equal seeds are paired, and seeds that only one side has are left out. None if nothing is left.
    """
    if one_to and len(to) == 1:
        (reference,) = to.values()
        return over_seeds(value - reference for _, value in sorted(of.items()))
    if one_of and len(of) == 1:
        (single,) = of.values()
        return over_seeds(single - value for _, value in sorted(to.items()))
    return over_seeds(of[seed] - to[seed] for seed in sorted(of.keys() & to.keys()))


def ratio(of: Estimate | None, to: Estimate | None) -> Estimate | None:
    """Ratio of two means, without an interval."""
    if of is None or to is None or to.mean == 0:
        return None
    return Estimate(of.mean / to.mean, None, min(of.n, to.n), None)
