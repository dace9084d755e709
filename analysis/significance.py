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
Only `scipy.special` is used (in `tails.py`): `scipy.stats` and statsmodels would add a second of imports for the same
formulas. All differences of a column are tested at once, because thousands of small calls were what tables waited for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.items import Array, Items
from analysis.tails import Part, mcnemar, plain_freedom, tails, two_sided_normal

LEVEL = 0.05
DRAWS = 9_999
"""Sign flips of a permutation test."""
FEW = 200
"""Items with a difference up to which flips are drawn; with more the normal limit is as good."""
MANY = 500
"""Items from which a bootstrap draws their mean from its normal limit."""
RESAMPLES = 2_000
SEED = 260_506_402
"""Of every random draw here: the same store gives the same bytes."""


@dataclass(frozen=True)
class Comparison:
    """A minus B: a difference in the metric's own unit, and what chance says to it."""

    difference: float
    error: float
    """Its standard error, over items and seeds."""
    p: float
    """Two-sided."""
    test: str
    effect: float | None
    """Cohen's d of the paired item differences: mean over standard deviation; None where no item differs."""
    n: int
    seeds: tuple[int, int]
    parts: tuple[Part, ...] = ()
    """What the standard error is made of."""

    @property
    def freedom(self) -> float:
        """Degrees of freedom of a plain t test with the same bar at 5 %."""
        return plain_freedom(self.parts, LEVEL)


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
    return Pool(sum(row.variance * (row.seeds - 1) for row in several) / freedom, freedom)


@dataclass(frozen=True)
class Apart:
    """A minus B, item by item: what every test and interval of the two begins with."""

    a: Items
    b: Items
    strata: tuple[Array, ...]
    """The differences of the items by stratum, each `[items]` and a mean over seeds."""
    means: Array
    """`[strata]`."""
    squares: Array
    """Squared deviations from that mean, added up: `[strata]`."""

    @classmethod
    def of(cls, a: Items, b: Items) -> Apart:
        """Raises ValueError if the two are not `paired`."""
        if not paired(a, b):
            raise ValueError("the outcomes are of different items and cannot be paired")
        strata = tuple(x - y for x, y in zip(a.by_item, b.by_item, strict=True))
        means = [d.sum() / len(d) for d in strata]
        squares = [np.square(d - mean).sum() for d, mean in zip(strata, means, strict=True)]
        return cls(a, b, strata, np.array(means), np.array(squares))

    @property
    def difference(self) -> float:
        """Strata weighing alike."""
        return float(self.means.mean())

    @property
    def single(self) -> bool:
        """Whether there is one seed on either side."""
        return self.a.seeds == self.b.seeds == 1

    def variances(self) -> list[float]:
        """Of the items of each stratum; 0 for a stratum of one item, which tells nothing."""
        return [float(q) / (len(d) - 1) if len(d) > 1 else 0.0 for q, d in zip(self.squares, self.strata, strict=True)]

    def parts(self, seeds: Pool | None) -> tuple[Part, ...]:
        """What the difference owes to the choice of items, and to the seeds of each side."""
        items = sum(v / len(d) for v, d in zip(self.variances(), self.strata, strict=True)) / len(self.strata) ** 2
        parts = [Part(items, max(sum(len(d) - 1 for d in self.strata), 1))]
        several = [side for side in (self.a, self.b) if side.seeds > 1]
        if several and (seeds := seeds or pool([self.a, self.b])) is not None:
            own = (max(side.variance, seeds.variance) / side.seeds for side in several)
            parts.append(Part(sum(own), seeds.freedom))
        return tuple(parts)


def compare(a: Items, b: Items, seeds: Pool | None = None) -> Comparison:
    """Test A against B; both must be `paired`. Raises ValueError if they are not.

    Two seeds may lie close by luck: where the rows of the column together (`seeds`) vary more than one side does,
    that side is taken to vary as they do.
    """
    return compared([Apart.of(a, b)], seeds)[0]


def compared(pairs: Sequence[Apart], seeds: Pool | None = None) -> list[Comparison]:
    """The tests of `compare`, of all the differences of a column at once."""
    sources = [one.parts(seeds) for one in pairs]
    errors = [math.sqrt(sum(part.variance for part in parts)) for parts in sources]
    several = [not one.single and error > 0 for one, error in zip(pairs, errors, strict=True)]
    beyond = iter(
        tails(
            [abs(one.difference) / error for one, error, asked in zip(pairs, errors, several, strict=True) if asked],
            [parts for parts, asked in zip(sources, several, strict=True) if asked],
        )
    )
    found = []
    by_items = _items_tests(pairs)
    for one, parts, error, asked, (p, test) in zip(pairs, sources, errors, several, by_items, strict=True):
        difference = one.difference
        if not one.single:
            certain = 1.0 if difference == 0 else 0.0
            p = max(p, min(1.0, 2 * float(next(beyond))) if asked else certain)
            test = "t over items and seeds"
        spread = math.sqrt(float(np.mean(one.variances())))
        effect = difference / spread if spread > 0 else None
        found.append(Comparison(difference, error, p, test, effect, one.a.n, (one.a.seeds, one.b.seeds), parts))
    return found


def equivalence(found: Comparison, margin: float) -> float:
    """p of two one-sided t tests: small where the difference is shown to lie within (-margin, margin)."""
    return equivalences([found], margin)[0]


def equivalences(found: Sequence[Comparison], margin: float) -> list[float]:
    """The same of many. Of the two tests the harder one counts."""
    asked = [one for one in found if one.error > 0]
    harder = iter(tails([(margin - abs(one.difference)) / one.error for one in asked], [one.parts for one in asked]))
    certain = (0.0 if abs(one.difference) < margin else 1.0 for one in found)
    return [float(next(harder)) if one.error > 0 else sure for one, sure in zip(found, certain, strict=True)]


def interval(a: Items, b: Items) -> tuple[float, float]:
    """95 % percentile bootstrap interval of A minus B: the seeds of each side and the items (the same of both) anew.

    With more than MANY items the mean of a resample of them is drawn from its normal limit, which is what it has then.
    """
    return intervals([Apart.of(a, b)])[0]


def intervals(pairs: Sequence[Apart]) -> list[tuple[float, float]]:
    """The intervals of many differences."""
    if not pairs:
        return []
    low, high = np.quantile([_resamples(one) for one in pairs], [LEVEL / 2, 1 - LEVEL / 2], axis=1)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def _resamples(one: Apart) -> Array:
    """The difference in each resample: `[RESAMPLES]`."""
    sizes, sides = tuple(len(d) for d in one.strata), (one.a.seeds, one.b.seeds)
    if one.a.n > MANY:
        spread = math.sqrt(sum(float(q) / n / n for q, n in zip(one.squares, sizes, strict=True))) / len(sizes)
        normal, chosen = _resampled(None, sides)
        drawn = one.difference + spread * normal[0]
    else:
        shares, chosen = _resampled(sizes, sides)
        drawn = np.mean([share @ d for d, share in zip(one.strata, shares, strict=True)], axis=0)
    for sign, side, seeds in zip((1, -1), (one.a, one.b), chosen, strict=True):
        if seeds is not None:
            means = side.by_seed
            drawn = drawn + sign * (means[seeds].mean(axis=1) - means.mean())
    return drawn


@functools.lru_cache(maxsize=16)
def _resampled(items: tuple[int, ...] | None, sides: tuple[int, int]) -> tuple[list[Any], list[Any]]:
    """What a bootstrap draws: (shares of items by stratum, or standard normals for None; places of seeds by side).

    Every comparison of the same shape draws the same, so that it is drawn once.
    """
    rng = np.random.default_rng(SEED)
    if items is None:
        drawn: list[Any] = [rng.standard_normal(RESAMPLES)]
    else:
        drawn = [_shares(rng.integers(0, count, (RESAMPLES, count))) for count in items]
    return drawn, [rng.integers(0, seeds, (RESAMPLES, seeds)) if seeds > 1 else None for seeds in sides]


def _shares(places: Array) -> Array:
    """How often each item was drawn, over how many are drawn: `[RESAMPLES, items]`, whose product is a mean."""
    resamples, count = places.shape
    rows = np.arange(resamples)[:, None] * count
    return np.bincount((rows + places).ravel(), minlength=resamples * count).reshape(places.shape) / count


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
    tested = compared([Apart.of(items[best], items[index]) for index in others], pool(items))
    pairs = len(items) * (len(items) - 1) // 2
    adjusted = holm([one.p for one in tested], pairs)
    return {best} | {index for index, p in zip(others, adjusted, strict=True) if p > LEVEL}


def _items_tests(pairs: Sequence[Apart]) -> list[tuple[float, str]]:
    """(p, name) of tests that take the models as they are: signs of the items' differences are as good as flipped.

    Comparisons of as many items share their flips, and are flipped together.
    """
    found: list[tuple[float, str]] = []
    few: dict[int, list[tuple[int, Array]]] = {}
    for index, one in enumerate(pairs):
        strata = [d[d != 0] for d in one.strata]
        if one.single and len(strata) == 1 and bool((np.abs(strata[0]) == 1).all()):
            wins = int((strata[0] > 0).sum())
            found.append((mcnemar(wins, len(strata[0]) - wins), "exact McNemar"))
            continue
        sizes = [len(d) for d in one.strata]
        weighted = np.concatenate([d / size / len(sizes) for d, size in zip(strata, sizes, strict=True)])
        if 0 < len(weighted) <= FEW:
            few.setdefault(len(weighted), []).append((index, weighted))
        found.append((_normal(weighted), "sign-flip permutation"))
    for count, own in few.items():
        together = np.stack([weighted for _, weighted in own], axis=1)
        observed = np.abs(together.sum(axis=0))
        extreme = (np.abs(_signs(count) @ together) >= observed * (1 - 1e-12)).sum(axis=0)
        for (index, _), reached in zip(own, extreme, strict=True):
            found[index] = (int(reached) + 1) / (DRAWS + 1), "sign-flip permutation"
    return found


def _normal(weighted: Array) -> float:
    """The p of so large a sum by the normal limit of flipped signs; 1 without items."""
    if not len(weighted):
        return 1.0
    return two_sided_normal(abs(float(weighted.sum())) / math.sqrt(float((weighted**2).sum())))


@functools.lru_cache(maxsize=8)
def _signs(n: int) -> Array:
    """The sign flips of `n` items: `[DRAWS, n]`, the same for every comparison."""
    flips = np.random.default_rng(SEED).integers(0, 2, (DRAWS, n), dtype=np.int8)
    return flips.astype(np.float64) * 2 - 1
