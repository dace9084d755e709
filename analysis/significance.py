"""Is a difference more than chance? Paired tests on the outcomes of single items, over items and over seeds.

Two sources of chance stand behind a number: which items were asked, and which seeds were trained.

- One seed on either side: exact McNemar test (questions, one task), else a sign-flip permutation test. It speaks of
  these models on other items, not of other seeds.
- Several seeds: a t test whose variance adds that over items and that over seeds, each with its own degrees of freedom,
  as one with unequal variances is tested after Cochran and Cox; and the permutation test of the items must agree: the
  larger p counts. (Satterthwaite's degrees of freedom are too many where two seeds lie close by luck: 6.0 % false wins
  of two rows with two seeds each, where this gives 3.7 %.)

Who is best is asked of the same data that name the best, so the p of each comparison with it is corrected (Holm) as
one of all pairs of the column. `tests/analysis/test_significance.py` measures the rate of false wins under the null.
Only `scipy.special` is used: `scipy.stats` and statsmodels would add a second of imports for the same formulas.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from analysis.items import Array, Items

LEVEL = 0.05
DRAWS = 9_999
"""Sign flips of a permutation test."""
FEW = 200
"""Items with a difference up to which flips are drawn; with more the normal limit is as good."""
MANY = 500
"""Items from which a bootstrap draws their mean from its normal limit."""
RESAMPLES = 2_000
EXACT, STEPS = 1e-8, 100
"""Relative precision of a quantile whose p is searched for, and the most steps of that search; it takes about ten."""
SEED = 260_506_402
"""Of every random draw here: the same store gives the same bytes."""


@dataclass(frozen=True)
class Part:
    """A source of chance in a difference: the variance it adds, and the degrees of freedom behind that number."""

    variance: float
    freedom: float


@dataclass(frozen=True)
class Comparison:
    """A minus B: a difference in the metric's own unit, and what chance says to it."""

    difference: float
    error: float
    """Its standard error, over items and seeds."""
    freedom: float
    """Degrees of freedom of a plain t test with the same bar at 5 %."""
    p: float
    """Two-sided."""
    test: str
    effect: float | None
    """Cohen's d of the paired item differences: mean over standard deviation; None where no item differs."""
    n: int
    seeds: tuple[int, int]
    parts: tuple[Part, ...] = ()
    """What the standard error is made of."""


def paired(a: Items, b: Items) -> bool:
    """Whether the two answer the same items in the same order."""
    return a.identity == b.identity and all(x.shape[1] == y.shape[1] for x, y in zip(a.strata, b.strata, strict=True))


@dataclass(frozen=True)
class Pool:
    """The variance between seeds, taken together over rows, and its degrees of freedom."""

    variance: float
    freedom: int


def pool(rows: Sequence[Items]) -> Pool | None:
    """Of all rows with several seeds; None without any."""
    several = [row for row in rows if row.seeds > 1]
    freedom = sum(row.seeds - 1 for row in several)
    if not freedom:
        return None
    return Pool(sum(float(row.by_seed.var(ddof=1)) * (row.seeds - 1) for row in several) / freedom, freedom)


def compare(a: Items, b: Items, seeds: Pool | None = None) -> Comparison:
    """Test A against B; both must be `paired`. Raises ValueError if they are not.

    Two seeds may lie close by luck: where the rows of the column together (`seeds`) vary more than one side does,
    that side is taken to vary as they do.
    """
    if not paired(a, b):
        raise ValueError("the outcomes are of different items and cannot be paired")
    differences = [x.mean(axis=0) - y.mean(axis=0) for x, y in zip(a.strata, b.strata, strict=True)]
    difference = float(np.mean([d.mean() for d in differences]))
    parts = _parts(a, b, differences, seeds or pool([a, b]))
    error = math.sqrt(sum(part.variance for part in parts))
    p, test = _items_test(differences, single=a.seeds == b.seeds == 1)
    if max(a.seeds, b.seeds) > 1:
        p = max(p, _two_sided(difference, error, parts))
        test = "t over items and seeds"
    spread = _spread(differences)
    effect = difference / spread if spread > 0 else None
    return Comparison(difference, error, _freedom(parts), p, test, effect, a.n, (a.seeds, b.seeds), parts)


def equivalence(found: Comparison, margin: float) -> float:
    """p of two one-sided t tests: small where the difference is shown to lie within (-margin, margin)."""
    if found.error == 0:
        return 0.0 if abs(found.difference) < margin else 1.0
    return _tail((margin - abs(found.difference)) / found.error, found.parts)  # the harder of the two


def interval(a: Items, b: Items) -> tuple[float, float]:
    """95 % percentile bootstrap interval of A minus B: the seeds of each side and the items (the same of both) anew.

    With more than MANY items the mean of a resample of them is drawn from its normal limit, which is what it has then.
    """
    differences = [x.mean(axis=0) - y.mean(axis=0) for x, y in zip(a.strata, b.strata, strict=True)]
    sides = (a.seeds, b.seeds)
    if a.n > MANY:
        spread = math.sqrt(sum(float(d.var()) / len(d) for d in differences)) / len(differences)
        normal, chosen = _resampled(None, sides)
        drawn = float(np.mean([d.mean() for d in differences])) + spread * normal[0]
    else:
        places, chosen = _resampled(tuple(len(d) for d in differences), sides)
        drawn = np.mean([d[place].mean(axis=1) for d, place in zip(differences, places, strict=True)], axis=0)
    for sign, side, seeds in zip((1, -1), (a, b), chosen, strict=True):
        if seeds is not None:
            means = side.by_seed
            drawn = drawn + sign * (means[seeds].mean(axis=1) - means.mean())
    low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=16)
def _resampled(items: tuple[int, ...] | None, sides: tuple[int, int]) -> tuple[list[Any], list[Any]]:
    """What a bootstrap draws: (places of items by stratum, or standard normals for None; places of seeds by side).

    Every comparison of the same shape draws the same, so that it is drawn once.
    """
    rng = np.random.default_rng(SEED)
    if items is None:
        places: list[Any] = [rng.standard_normal(RESAMPLES)]
    else:
        places = [rng.integers(0, count, (RESAMPLES, count)) for count in items]
    return places, [rng.integers(0, seeds, (RESAMPLES, seeds)) if seeds > 1 else None for seeds in sides]


def holm(values: Sequence[float], family: int | None = None) -> list[float]:
    """Holm's adjusted p, in the order given; `family` counts the hypotheses where more were looked at than are here."""
    size = max(family or 0, len(values))
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, floor = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (size - rank) * values[index]))
        adjusted[index] = floor
    return adjusted


def leaders(items: Sequence[Items], scores: Sequence[float], *, high: bool) -> set[int]:
    """The best of a column and every other that is not shown to be worse; Holm over all pairs at 5 %.

    `scores` are the means that the table shows; items and scores of one row have one index.
    """
    best = (max if high else min)(range(len(scores)), key=lambda index: scores[index])
    others = [index for index in range(len(items)) if index != best]
    together = pool(items)
    tested = [compare(items[best], items[index], together).p for index in others]
    pairs = len(items) * (len(items) - 1) // 2
    return {best} | {index for index, p in zip(others, holm(tested, pairs), strict=True) if p > LEVEL}


def _parts(a: Items, b: Items, differences: Sequence[Array], seeds: Pool | None) -> tuple[Part, ...]:
    """What the difference owes to the choice of items, and to the seeds of each side."""
    items = sum(float(d.var(ddof=1)) / len(d) for d in differences if len(d) > 1) / len(differences) ** 2
    parts = [Part(items, max(sum(len(d) - 1 for d in differences), 1))]
    several = [side for side in (a, b) if side.seeds > 1]
    if several and seeds is not None:
        own = (max(float(side.by_seed.var(ddof=1)), seeds.variance) / side.seeds for side in several)
        parts.append(Part(sum(own), seeds.freedom))
    return tuple(parts)


def _two_sided(difference: float, error: float, parts: Sequence[Part]) -> float:
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return min(1.0, 2 * _tail(abs(difference) / error, parts))


def _tail(t: float, parts: Sequence[Part]) -> float:
    """The p at which the parts' own quantiles of Student's t, weighed by their variances, reach `t` (Cochran and Cox).

    Of one part that is the ordinary one-sided p. The quantiles only fall with p, so that the parts' own p enclose it.
    """
    if t < 0:
        return 1.0 - _tail(-t, parts)
    known = [part for part in parts if part.variance > 0]
    alone = [float(special.stdtr(part.freedom, -t)) for part in known]
    low, high = min(alone), max(alone)
    if low == 0 or high - low <= EXACT * high:
        return high
    total = sum(part.variance for part in known)

    def beyond(log_p: float) -> float:
        return math.log(_quantile(math.exp(log_p), known, total) / t)

    left, right = math.log(low), math.log(high)
    above, below, middle = beyond(left), beyond(right), right
    for _ in range(STEPS):  # the Illinois method: false position that halves the weight of an end that stays
        middle = right - below * (right - left) / (below - above)
        found = beyond(middle)
        if abs(found) <= EXACT:
            break
        if found > 0:
            left, above, below = middle, found, below / 2
        else:
            right, below, above = middle, found, above / 2
    return math.exp(middle)


def _quantile(p: float, parts: Sequence[Part], total: float) -> float:
    """The t whose one-sided p is `p`, weighed over the parts."""
    return sum(part.variance * -float(special.stdtrit(part.freedom, p)) for part in parts) / total


def _freedom(parts: Sequence[Part]) -> float:
    """Degrees of freedom of the one t distribution with the same quantile at LEVEL, two-sided."""
    known = [part for part in parts if part.variance > 0]
    if len(known) < 2:
        return float((known or list(parts))[0].freedom)
    bar = _quantile(LEVEL / 2, known, sum(part.variance for part in known))
    return float(special.stdtridf(LEVEL / 2, -bar))


def _items_test(differences: Sequence[Array], *, single: bool) -> tuple[float, str]:
    """(p, name) of a test that takes the models as they are: signs of the items' differences are as good as flipped."""
    weighted = np.concatenate([d / len(d) / len(differences) for d in differences])
    weighted = weighted[weighted != 0]
    binary = single and len(differences) == 1 and all(np.isin(d, (-1, 0, 1)).all() for d in differences)
    if binary:
        wins, losses = int((weighted > 0).sum()), int((weighted < 0).sum())
        return mcnemar(wins, losses), "exact McNemar"
    if not len(weighted):
        return 1.0, "sign-flip permutation"
    observed = abs(float(weighted.sum()))
    if len(weighted) > FEW:
        return float(2 * special.ndtr(-observed / math.sqrt(float((weighted**2).sum())))), "sign-flip permutation"
    extreme = int((np.abs(_signs(len(weighted)) @ weighted) >= observed * (1 - 1e-12)).sum())
    return (extreme + 1) / (DRAWS + 1), "sign-flip permutation"


@functools.lru_cache(maxsize=8)
def _signs(n: int) -> Array:
    """The sign flips of `n` items: `[DRAWS, n]`, the same for every comparison."""
    flips = np.random.default_rng(SEED).integers(0, 2, (DRAWS, n), dtype=np.int8)
    return flips.astype(np.float64) * 2 - 1


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p of McNemar's test, from the items that only one of the two got right."""
    if wins == losses:
        return 1.0
    return float(min(1.0, 2 * special.bdtr(min(wins, losses), wins + losses, 0.5)))


def _spread(differences: Sequence[Array]) -> float:
    """Standard deviation of the item differences, strata weighing alike."""
    return math.sqrt(float(np.mean([d.var(ddof=1) if len(d) > 1 else 0.0 for d in differences])))
