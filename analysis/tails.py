"""Tails of differences with two sources of chance, after Cochran and Cox: many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

EXACT, STEPS = 1e-8, 100
"""Relative precision of a quantile whose p is searched for, and the most steps of that search; it takes about ten."""

SMALLEST = 1e-280
"""Of a p whose quantile can be trusted: scipy's are no numbers near the end of floating point."""

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Part:
    """A source of chance in a difference: the variance it adds, and the degrees of freedom behind that number."""

    variance: float
    freedom: float


def tails(ts: Sequence[float], sources: Sequence[Sequence[Part]]) -> Array:
    """The one-sided p of each t, whose variance comes from its sources, of which one or two may be above zero.

    It is the p at which the parts' own quantiles of Student's t, weighed by their variances, reach `t`. Of one part
    that is the ordinary p. The quantiles only fall with p, so that the parts' own p enclose it.
    """
    t = np.array([abs(value) for value in ts], dtype=float)
    known = [[part for part in parts if part.variance > 0] for parts in sources]
    # a part that stands alone is weighed with itself, which changes nothing
    variance = np.array([[parts[0].variance, parts[-1].variance] for parts in known], dtype=float).reshape(-1, 2)
    freedom = np.array([[parts[0].freedom, parts[-1].freedom] for parts in known], dtype=float).reshape(-1, 2)
    alone = scipy.special.stdtr(freedom, -t[:, None])
    low, high = alone.min(axis=1, initial=1.0), alone.max(axis=1, initial=0.0)
    found = high.copy()
    apart = np.flatnonzero((low > SMALLEST) & (high - low > EXACT * high))
    if len(apart):
        found[apart] = _between(t[apart], variance[apart], freedom[apart], low[apart], high[apart])
    return np.where(np.array(ts) < 0, 1.0 - found, found)


def _between(t: Array, variance: Array, freedom: Array, low: Array, high: Array) -> Array:
    """The p of each t, in (low, high), by the Illinois method: false position that halves an end which lasts."""

    def beyond(log_p: Array, at: Any) -> Array:
        return np.log(_quantiles(np.exp(log_p), variance[at], freedom[at]) / t[at])

    at = np.arange(len(t))
    left, right = np.log(low), np.log(high)
    above, below = beyond(left, at), beyond(right, at)
    middle = right.copy()
    for _ in range(STEPS):
        middle[at] = right[at] - below[at] * (right[at] - left[at]) / (below[at] - above[at])
        off = beyond(middle[at], at)
        near = np.abs(off) <= EXACT
        at, off = at[~near], off[~near]
        if not len(at):
            break
        up, down = at[off > 0], at[off <= 0]
        left[up], above[up], below[up] = middle[up], off[off > 0], below[up] / 2
        right[down], below[down], above[down] = middle[down], off[off <= 0], above[down] / 2
    return np.exp(middle)


def _quantiles(p: Array, variance: Array, freedom: Array) -> Array:
    """The t whose one-sided p is `p`, weighed over the two parts."""
    each = variance * -scipy.special.stdtrit(freedom, p[:, None])
    return (each[:, 0] + each[:, 1]) / (variance[:, 0] + variance[:, 1])


def plain_freedom(parts: Sequence[Part], level: float) -> float:
    """Degrees of freedom of the one t distribution with the same two-sided quantile at `level`."""
    known = [part for part in parts if part.variance > 0]
    if len(known) < 2:
        return float((known or list(parts))[0].freedom)
    total = sum(part.variance for part in known)
    bar = sum(part.variance * -float(scipy.special.stdtrit(part.freedom, level / 2)) for part in known) / total
    return float(scipy.special.stdtridf(level / 2, -bar))


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p of McNemar's test, from the items that only one of the two got right."""
    if wins == losses:
        return 1.0
    return float(min(1.0, 2 * scipy.special.bdtr(min(wins, losses), wins + losses, 0.5)))


def two_sided_normal(distance: float) -> float:
    """The p of a standard normal at least so far from zero."""
    return float(2 * scipy.special.ndtr(-abs(distance)))
