"""Numbers over seeds: mean, spread, interval; nothing is averaged over silently."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. `half` is half the width of the 95 % t interval, None for a single value."""

    mean: float
    std: float | None
    n: int
    half: float | None


def over_seeds(values: Sequence[float]) -> Estimate | None:
    """The estimate of some seeds' values, None of none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Estimate(mean, None, 1, None)
    std = statistics.stdev(known)
    half = float(stdtrit(len(known) - 1, 0.975)) * std / math.sqrt(len(known))
    return Estimate(mean, std, len(known), half)


def difference(of: Estimate | None, to: Estimate | None) -> Estimate | None:
    """Difference of two means, without an interval (pairing needs per-item results)."""
    if of is None or to is None:
        return None
    return Estimate(of.mean - to.mean, None, min(of.n, to.n), None)


def ratio(of: Estimate | None, to: Estimate | None) -> Estimate | None:
    """Ratio of two means, without an interval."""
    if of is None or to is None or to.mean == 0:
        return None
    return Estimate(of.mean / to.mean, None, min(of.n, to.n), None)
