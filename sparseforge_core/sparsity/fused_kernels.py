"""The Triton kernel of the fused mask update: one pass over all sites at once.

`sparsity/fused.py` decides who comes here and says what is computed. A program works on some tiles of one site;
`owner` says whose, `table` holds each site's addresses and sizes. Nothing is added atomically, so that the same
inputs give the same bits. Scores are standardised by what `statistics_kernels.py` found: of the score
s = (H + eps) W^2 of a site, x = a multiple of s (and of the floor under its logarithm), y = log2 x, and the gate's
exponent is a multiple of y - tau. The mean is lost in that difference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparseforge_core.sparsity.group_kernels import (
    FIELDS,
    MAGIC,
    STEPS,
    address,
    beaten,
    bfloat,
    clamped_product,
    first_of,
    first_of_whole,
    groups,
    load,
    load_halves,
    log2,
    packed,
    sigmoid2,
    store,
    store_halves,
    threshold,
    unpacked,
)

OBD: tl.constexpr = tl.constexpr(0)
MAGNITUDE: tl.constexpr = tl.constexpr(1)
GIVEN: tl.constexpr = tl.constexpr(2)

SUMS: tl.constexpr = tl.constexpr(8)
"""Numbers that a program may add up, a row of `partial`: flips, m between 0.1 and 0.9, |m - m_hat|; H, x, y, y^2."""

CONSTANTS: tl.constexpr = tl.constexpr(4)
"""Of each site: what multiplies the statistic, what is added to it or multiplies what is given, what is added to
the score, and the gate's exponent per y at T = 1."""

SCALE: tl.constexpr = tl.constexpr(6)
RELATIVE_EPS: tl.constexpr = tl.constexpr(7)
"""Places in `settings`, the numbers of an update, float32: 1/T, beta, kappa, alpha, the margin of hysteresis, the
view's softness; what a kept statistic is multiplied by, and eps relative to the mean curvature. On the device, so that
a recorded update (`fused.Updater`) finds those of its turn."""


@triton.jit
def scored(w, h, constants, CRITERION: tl.constexpr):
    """x: importance in units of the layer's mean, plus the floor under its logarithm."""
    factor, share, floor = constants
    if CRITERION == OBD:
        return (h * factor + share) * (w * w) + floor
    elif CRITERION == MAGNITUDE:
        return tl.abs(w) * share + floor
    else:
        return w * share + floor


@triton.jit
def update(
    table, owner, weights, statistics, masks, hards, views, standard, partial, settings,
    KEEP: tl.constexpr, M: tl.constexpr, TRANSPOSED: tl.constexpr, CRITERION: tl.constexpr, LOG: tl.constexpr,
    MIDPOINT: tl.constexpr, BLEND: tl.constexpr, PULL_GATE: tl.constexpr, FIXED: tl.constexpr,
    HYSTERESIS: tl.constexpr, BY_SCORES: tl.constexpr, ABOVE_HALF: tl.constexpr, PACKED: tl.constexpr,
    HALF: tl.constexpr, EVEN: tl.constexpr, GATHER: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lines 8-12 of algorithm 1 and the quenched view, for REPEAT tiles of `BLOCK` groups.

    Added up are entries of the hard mask that flipped, of m between 0.1 and 0.9, and |m - m_hat|; with GATHER also what
    the next update may standardise by. With EVEN all groups of all tiles exist. A group with a score that is not finite
    is left as it is, and its program reports NaN flips.
    """
    program = tl.program_id(0)
    steepness, structure_mix, mid_push = tl.load(settings), tl.load(settings + 1), tl.load(settings + 2)
    mask_rate, margin, softness = tl.load(settings + 3), tl.load(settings + 4), tl.load(settings + 5)
    site = tl.load(owner + program).to(tl.int64)
    row_of, about = table + site * FIELDS, standard + site * CONSTANTS
    constants = (tl.load(about), tl.load(about + 1), tl.load(about + 2))
    exponent = tl.load(about + 3)
    sharpness, defence = exponent * steepness, margin / (exponent * 0.6931471805599453)
    one: tl.constexpr = STEPS if PACKED else 1.0
    back = -(mid_push / one)
    weights, statistics = address(table, site, 0, weights), address(table, site, 1, statistics)
    masks, hards, views = address(table, site, 2, masks), address(table, site, 3, hards), address(table, site, 4, views)
    tile = (program - tl.load(row_of + 5)) * REPEAT

    flips, middle = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    gap, sum_h = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    sum_x, sum_y = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    sum_squares = tl.zeros((BLOCK,), tl.float32)
    for turn in range(REPEAT):
        first, out, there = groups(row_of, tile + turn, BLOCK, M, TRANSPOSED, EVEN)
        w = load(weights, first, out, there, BLOCK, M, TRANSPOSED, EVEN)
        h = w
        if CRITERION == OBD:
            if HALF:
                h = load_halves(statistics, first, out, there, BLOCK, M, TRANSPOSED, EVEN)
            else:
                h = load(statistics, first, out, there, BLOCK, M, TRANSPOSED, EVEN)
        if PACKED:
            stored = load_halves(masks, first, out, there, BLOCK, M, TRANSPOSED, EVEN)
        else:
            stored = load(masks, first, out, there, BLOCK, M, TRANSPOSED, EVEN)
            kept = load(hards, first, out, there, BLOCK, M, TRANSPOSED, EVEN)
        y, m, old = (), (), ()
        for i in tl.static_range(M):
            if HALF:
                hi = bfloat(h, i, TRANSPOSED)
            else:
                hi = h[i]
            x = scored(w[i], hi, constants, CRITERION)
            yi = x
            if LOG:
                yi = log2(x)
            y = y + (yi,)
            if i == 0:
                total = yi
            else:
                total += yi
            if GATHER:
                if CRITERION == OBD:
                    sum_h += hi
                sum_x += tl.where(there, x, 0.0)
                sum_squares += tl.where(there, yi * yi, 0.0)
            if PACKED:
                value, keeps = unpacked(stored, i, TRANSPOSED)
                m, old = m + (value,), old + (keeps,)
            else:
                m, old = m + (stored[i],), old + (tl.where(kept[i] != 0, 1.0, 0.0),)
        if GATHER:
            sum_y += tl.where(there, total, 0.0)
        # Where nothing can be ranked, what was there is written again: masked stores would go entry by entry.
        good = there & (tl.abs(total * exponent) < float("inf"))
        rate = tl.where(good, mask_rate, 0.0)

        counts = beaten(y, y, M, False)
        if FIXED:
            target = old
        elif HYSTERESIS:
            held = ()
            for i in tl.static_range(M):
                held = held + (y[i] + defence * old[i],)
            target = first_of(beaten(held, held, M, False), KEEP, M)
        else:
            target = first_of(counts, KEEP, M)
        pivot = threshold(y, counts, KEEP, M, MIDPOINT) * sharpness

        gate = ()
        for i in tl.static_range(M):
            g = sigmoid2(pivot - y[i] * sharpness)
            if BLEND:
                g = g * (1.0 - structure_mix) + target[i] * (structure_mix if PULL_GATE else structure_mix + mid_push)
            elif not PULL_GATE:
                g += target[i] * mid_push
            gate = gate + (g,)
        if PULL_GATE:
            pull, g = first_of(beaten(gate, gate, M, False), KEEP, M), gate
            gate = ()
            for i in tl.static_range(M):
                gate = gate + (g[i] + mid_push * pull[i],)
        new, raised, placed = (), (), ()
        for i in tl.static_range(M):
            pushed = clamped_product(m[i], back, gate[i])
            value = m[i] + rate * (pushed * one - m[i])
            if PACKED:  # to the nearest step: what is ranked, seen and stored is one number
                raised = raised + (value + MAGIC,)
                value = raised[i] - MAGIC
            new, placed = new + (value,), placed + (value * M + counts[i],)

        if BY_SCORES:
            keep = target
        elif PACKED:  # steps and ranks together are whole numbers below 2^24
            keep = first_of_whole(placed, KEEP, M)
        else:
            keep = first_of(beaten(new, counts, M, True), KEEP, M)
        codes, view, bits = (), (), ()
        for i in tl.static_range(M):
            keeps = tl.where(good, keep[i], old[i])
            middle += tl.where(tl.abs(new[i] - 0.5 * one) < 0.4 * one, 1.0, 0.0)
            gap += tl.abs(new[i] - one * keeps)
            if i == 0:
                flipped = tl.abs(keeps - old[i])
            else:
                flipped += tl.abs(keeps - old[i])
            if PACKED:
                codes = codes + (packed(new[i], raised[i], keeps),)
            else:
                bits = bits + ((keeps != 0.0).to(tl.int8),)
                shown = keeps
                if ABOVE_HALF:
                    shown = tl.where(new[i] > 0.5, 1.0, 0.0)
                view = view + (softness * new[i] + (1.0 - softness) * shown,)
        flips += tl.where(good, flipped, tl.where(there, float("nan"), 0.0))
        if PACKED:
            store_halves(masks, first, out, there, codes, BLOCK, M, TRANSPOSED, EVEN)
        else:
            store(masks, first, out, there, new, BLOCK, M, TRANSPOSED, EVEN)
            store(hards, first, out, there, bits, BLOCK, M, TRANSPOSED, EVEN)
            store(views, first, out, there, view, BLOCK, M, TRANSPOSED, EVEN)

    row = partial + program.to(tl.int64) * SUMS
    tl.store(row, tl.sum(flips))
    tl.store(row + 1, tl.sum(middle))
    tl.store(row + 2, tl.sum(gap) / one)
    if GATHER:
        tl.store(row + 3, tl.sum(sum_h))
        tl.store(row + 4, tl.sum(sum_x))
        tl.store(row + 5, tl.sum(sum_y))
        tl.store(row + 6, tl.sum(sum_squares))
