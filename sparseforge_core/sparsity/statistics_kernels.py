"""Triton kernels around the fused mask update's one pass: what scores are standardised by, and sums of what it reports.

A layer's mean curvature and mean score take a pass over weight and curvature, or over every n-th row of them; the
deviation of its scores takes another. What a site's tiles add up is added by one program a site, in float64 and always
in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparseforge_core.sparsity.fused_kernels import CONSTANTS, MAGNITUDE, OBD, RELATIVE_EPS, SCALE, SUMS, scored
from sparseforge_core.sparsity.group_kernels import FIELDS, address, log2

KNOWN: tl.constexpr = tl.constexpr(3)
"""What is known of a site, float64: mean curvature, mean score, deviation of scores or of their logarithms."""

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG_FLOOR: tl.constexpr = tl.constexpr(1e-10)
SMALLEST: tl.constexpr = tl.constexpr(1e-38)
SPREAD_FLOOR: tl.constexpr = tl.constexpr(1e-6)
"""The constants of `criteria.standardize`."""

LEAST: tl.constexpr = tl.constexpr(1e-30)
"""Added to a mean score before it becomes the unit of scores: without it that of a dead layer would be infinite."""


@triton.jit
def _looked_at(row_of, BLOCK: tl.constexpr):
    """Of a tile of the rows that are looked at: its first entry, and which exist from there, `[BLOCK]`."""
    tile = tl.program_id(0) - tl.load(row_of + 12)
    columns, stride = tl.multiple_of(tl.load(row_of + 10), 16), tl.multiple_of(tl.load(row_of + 11), 16)
    across = tl.cdiv(columns, BLOCK)
    column = tile % across * BLOCK
    left = tl.minimum(columns - column, BLOCK).to(tl.int32)
    return tile // across * stride + column, tl.arange(0, BLOCK) < left


@triton.jit
def sum_scores(table, owner, weights, statistics, partial, CRITERION: tl.constexpr, BLOCK: tl.constexpr):
    """Of each tile: sums of H, H W^2 and W^2, H as it is kept (of scores in the first place, where no H is needed)."""
    site = tl.load(owner + tl.program_id(0)).to(tl.int64)
    first, there = _looked_at(table + site * FIELDS, BLOCK)
    places = tl.arange(0, BLOCK)
    w = tl.load(address(table, site, 0, weights) + first + places, mask=there, other=0.0)
    out = partial + tl.program_id(0).to(tl.int64) * SUMS
    if CRITERION == OBD:
        h = tl.load(address(table, site, 1, statistics) + first + places, mask=there, other=0.0).to(tl.float32)
        square = w * w
        tl.store(out, tl.sum(h))
        tl.store(out + 1, tl.sum(h * square))
        tl.store(out + 2, tl.sum(square))
    else:
        tl.store(out, tl.sum(tl.abs(w) if CRITERION == MAGNITUDE else w))


@triton.jit
def sum_logs(
    table, owner, weights, statistics, standard, partial,
    CRITERION: tl.constexpr, LOG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each tile: sums of y and y^2."""
    site = tl.load(owner + tl.program_id(0)).to(tl.int64)
    first, there = _looked_at(table + site * FIELDS, BLOCK)
    places = tl.arange(0, BLOCK)
    w = tl.load(address(table, site, 0, weights) + first + places, mask=there, other=0.0)
    h = w
    if CRITERION == OBD:
        h = tl.load(address(table, site, 1, statistics) + first + places, mask=there, other=0.0).to(tl.float32)
    about = standard + site * CONSTANTS
    y = scored(w, h, (tl.load(about), tl.load(about + 1), tl.load(about + 2)), CRITERION)
    if LOG:
        y = log2(y)
    y = tl.where(there, y, 0.0)
    out = partial + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(out, tl.sum(y))
    tl.store(out + 1, tl.sum(y * y))


@triton.jit
def _totals(partial, begin, end, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """Column sums over the rows from `begin` to `end`, at most MOST, float64 `[SUMS]`."""
    columns = tl.arange(0, SUMS)[None, :]
    found = tl.zeros((BLOCK, SUMS), dtype=tl.float64)
    for tile in range(0, MOST, BLOCK):
        rows = (begin + tile + tl.arange(0, BLOCK))[:, None]
        found += tl.load(partial + rows * SUMS + columns, mask=rows < end, other=0.0).to(tl.float64)
    return tl.sum(found, axis=0)


@triton.jit
def _at(totals, place: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SUMS) == place, totals, 0.0))


@triton.jit
def _scale(about, curvature, score, scale, relative_eps, CRITERION: tl.constexpr, LOG: tl.constexpr):
    """Write what turns weight and statistic into x: the first three constants of a site."""
    unit = 1.0 / (score + LEAST)
    floor = (LOG_FLOOR * score + SMALLEST) * unit
    factor, share = scale * unit, relative_eps * curvature * unit
    if CRITERION != OBD:
        factor, share = 0.0 * unit, unit
    tl.store(about, factor.to(tl.float32))
    tl.store(about + 1, share.to(tl.float32))
    tl.store(about + 2, (floor if LOG else 0.0 * floor).to(tl.float32))


@triton.jit
def _exponent(about, score, deviation, LOG: tl.constexpr):
    """Write the gate's exponent per y: the last constant of a site."""
    exponent = 1.0 / (deviation + SPREAD_FLOOR)
    if not LOG:
        exponent *= (score + LEAST) / LN2
    tl.store(about + 3, exponent.to(tl.float32))


@triton.jit
def _deviation(total, squares, count, score, LOG: tl.constexpr):
    """Standard deviation of log-scores, or of scores, from sums of y and y^2."""
    mean = total / count
    variance = squares / count - mean * mean
    spread = tl.sqrt(tl.where(variance < 0.0, 0.0, variance))
    return spread * LN2 if LOG else spread * (score + LEAST)


@triton.jit
def site_means(
    table, bounds, partial, known, standard, settings,
    CRITERION: tl.constexpr, LOG: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean curvature and mean score of each site, from `sum_scores`."""
    site = tl.program_id(0)
    scale, relative_eps = tl.load(settings + SCALE), tl.load(settings + RELATIVE_EPS)
    totals = _totals(partial, tl.load(bounds + site), tl.load(bounds + site + 1), MOST, BLOCK)
    count = tl.load(table + site * FIELDS + 13).to(tl.float64)
    score, curvature = _at(totals, 0) / count, 0.0 * count
    if CRITERION == OBD:
        curvature = scale * score
        score = scale * _at(totals, 1) / count + relative_eps * curvature * _at(totals, 2) / count
    tl.store(known + site * KNOWN, curvature)
    tl.store(known + site * KNOWN + 1, score)
    _scale(standard + site * CONSTANTS, curvature, score, scale, relative_eps, CRITERION, LOG)


@triton.jit
def site_spreads(table, bounds, partial, known, standard, LOG: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """Deviation of the scores of each site, from `sum_logs`."""
    site = tl.program_id(0)
    totals = _totals(partial, tl.load(bounds + site), tl.load(bounds + site + 1), MOST, BLOCK)
    count, score = tl.load(table + site * FIELDS + 13).to(tl.float64), tl.load(known + site * KNOWN + 1)
    deviation = _deviation(_at(totals, 0), _at(totals, 1), count, score, LOG)
    tl.store(known + site * KNOWN + 2, deviation)
    _exponent(standard + site * CONSTANTS, score, deviation, LOG)


@triton.jit
def site_constants(known, standard, settings, CRITERION: tl.constexpr, LOG: tl.constexpr):
    """The constants of each site from what an earlier update knew of it."""
    site = tl.program_id(0)
    scale, relative_eps = tl.load(settings + SCALE), tl.load(settings + RELATIVE_EPS)
    about = known + site * KNOWN
    curvature, score, deviation = tl.load(about), tl.load(about + 1), tl.load(about + 2)
    _scale(standard + site * CONSTANTS, curvature, score, scale, relative_eps, CRITERION, LOG)
    _exponent(standard + site * CONSTANTS, score, deviation, LOG)


@triton.jit
def site_reports(
    table, bounds, partial, shares, known, following, settings,
    LOG: tl.constexpr, GATHER: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the update reports of each site, as means over its entries; with GATHER, what is known for the next one."""
    site = tl.program_id(0)
    totals = _totals(partial, tl.load(bounds + site), tl.load(bounds + site + 1), MOST, BLOCK)
    count = tl.load(table + site * FIELDS + 9).to(tl.float64)
    tl.store(shares + site * 3, (_at(totals, 0) / count).to(tl.float32))
    tl.store(shares + site * 3 + 1, (_at(totals, 1) / count).to(tl.float32))
    tl.store(shares + site * 3 + 2, (_at(totals, 2) / count).to(tl.float32))
    if GATHER:
        score, scale = tl.load(known + site * KNOWN + 1), tl.load(settings + SCALE)
        deviation = _deviation(_at(totals, 5), _at(totals, 6), count, score, LOG)
        tl.store(following + site * KNOWN, scale * _at(totals, 3) / count)
        tl.store(following + site * KNOWN + 1, _at(totals, 4) / count * (score + LEAST))
        tl.store(following + site * KNOWN + 2, deviation)


@triton.jit
def average_squares(table, owner, averages, gradients, decay, BLOCK: tl.constexpr):
    """average <- decay average + (1 - decay) g g for one tile; the table's rows: both distances, first tile, size."""
    tile = tl.program_id(0)
    row_of = table + tl.load(owner + tile).to(tl.int64) * 4
    place = (tile - tl.load(row_of + 2)) * BLOCK + tl.arange(0, BLOCK)
    there = place < tl.multiple_of(tl.load(row_of + 3), 16)
    average = averages + tl.multiple_of(tl.load(row_of), 16) + place
    gradient = tl.load(gradients + tl.multiple_of(tl.load(row_of + 1), 16) + place, mask=there, other=0.0)
    kept = tl.load(average, mask=there, other=0.0).to(tl.float32)
    kept = kept * decay + gradient * gradient * (1.0 - decay)
    tl.store(average, kept.to(averages.dtype.element_ty), mask=there)
