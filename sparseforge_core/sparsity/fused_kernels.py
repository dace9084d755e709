"""Triton kernels of the fused mask update: two statistics passes and one update pass over all sites at once.

`sparsity/fused.py` decides who comes here and says what is computed. A program works on one tile of one site;
`owner` says whose, `table` holds each site's addresses and sizes. Nothing is added atomically, so that the same
inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS: tl.constexpr = tl.constexpr(11)
"""Columns of the table: where weight, statistic, mask, hard mask and view begin, the site's first tile in the update,
its number of groups, stored row length, rows looked at, entries from one of these to the next, first tile in a look."""

OBD: tl.constexpr = tl.constexpr(0)
MAGNITUDE: tl.constexpr = tl.constexpr(1)
GIVEN: tl.constexpr = tl.constexpr(2)

SUMS: tl.constexpr = tl.constexpr(3)
"""Numbers that a tile or site adds up in a statistics pass."""


@triton.jit
def _address(table, site, field: tl.constexpr, anchor):
    """Where a site's tensor begins, as a distance from the first site's: so the compiler knows it to be aligned."""
    return anchor + tl.multiple_of(tl.load(table + site * FIELDS + field), 16)


@triton.jit
def _score(weight, statistic, eps, criterion: tl.constexpr):
    """Importance: (H + eps) W^2, |W|, or what was given."""
    if criterion == OBD:
        return (statistic + eps) * (weight * weight)
    elif criterion == MAGNITUDE:
        return tl.abs(weight)
    else:
        return weight


@triton.jit
def _looked_at(table, owner, SAMPLED: tl.constexpr, BLOCK: tl.constexpr):
    """Site, offsets `[BLOCK]` of a tile of all stored rows or of every n-th, and which of them exist."""
    tile = tl.program_id(0)
    site = tl.load(owner + tile).to(tl.int64)
    row_of = table + site * FIELDS
    columns, rows, stride = tl.multiple_of(tl.load(row_of + 7), 16), tl.load(row_of + 8), tl.load(row_of + 9)
    place = (tile - tl.load(row_of + 10)) * BLOCK + tl.arange(0, BLOCK)
    offsets = place
    if SAMPLED:
        offsets = place // columns * stride + place % columns
    return site, offsets, place < rows * columns


@triton.jit
def sum_scores(
    table, owner, weights, statistics, partial, scale,
    CRITERION: tl.constexpr, SAMPLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each tile: sums of H, H W^2 and W^2 (of scores in the first place, where no curvature is needed)."""
    site, offsets, there = _looked_at(table, owner, SAMPLED, BLOCK)
    w = tl.load(_address(table, site, 0, weights) + offsets, mask=there, other=0.0).to(tl.float32)
    out = partial + tl.program_id(0) * SUMS
    if CRITERION == OBD:
        h = tl.load(_address(table, site, 1, statistics) + offsets, mask=there, other=0.0).to(tl.float32) * scale
        square = w * w
        tl.store(out, tl.sum(h))
        tl.store(out + 1, tl.sum(h * square))
        tl.store(out + 2, tl.sum(square))
    else:
        s = _score(w, w, 0.0, CRITERION)
        tl.store(out, tl.sum(s))
        tl.store(out + 1, 0.0)
        tl.store(out + 2, 0.0)


@triton.jit
def sum_logs(
    table, owner, weights, statistics, partial, means, scale,
    CRITERION: tl.constexpr, LOG: tl.constexpr, SAMPLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each tile: sums of x and x^2, x being the score or its logarithm less that of the mean."""
    site, offsets, there = _looked_at(table, owner, SAMPLED, BLOCK)
    w = tl.load(_address(table, site, 0, weights) + offsets, mask=there, other=0.0).to(tl.float32)
    h = w
    if CRITERION == OBD:
        h = tl.load(_address(table, site, 1, statistics) + offsets, mask=there, other=0.0).to(tl.float32) * scale
    x = _centred(_score(w, h, tl.load(means + site * SUMS), CRITERION), means, site, LOG)
    x = tl.where(there, x, 0.0)
    out = partial + tl.program_id(0) * SUMS
    tl.store(out, tl.sum(x))
    tl.store(out + 1, tl.sum(x * x))
    tl.store(out + 2, 0.0)


@triton.jit
def _centred(s, means, site, LOG: tl.constexpr):
    """log(s + floor) - pivot, or s - pivot: the pivot keeps the sums of squares from cancelling."""
    if LOG:
        s = tl.log(s + tl.load(means + site * SUMS + 1))
    return s - tl.load(means + site * SUMS + 2)


@triton.jit
def add_up(partial, first, last, total, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of each site over its tiles, at most MOST, in float64 and always in the same order."""
    site = tl.program_id(0)
    begin, end = tl.load(first + site), tl.load(last + site)
    a = tl.zeros((BLOCK,), dtype=tl.float64)
    b = tl.zeros((BLOCK,), dtype=tl.float64)
    c = tl.zeros((BLOCK,), dtype=tl.float64)
    for tile in range(0, MOST, BLOCK):
        tiles = begin + tile + tl.arange(0, BLOCK)
        there = tiles < end
        a += tl.load(partial + tiles * SUMS, mask=there, other=0.0).to(tl.float64)
        b += tl.load(partial + tiles * SUMS + 1, mask=there, other=0.0).to(tl.float64)
        c += tl.load(partial + tiles * SUMS + 2, mask=there, other=0.0).to(tl.float64)
    tl.store(total + site * SUMS, tl.sum(a))
    tl.store(total + site * SUMS + 1, tl.sum(b))
    tl.store(total + site * SUMS + 2, tl.sum(c))


@triton.jit
def _split(x, BLOCK: tl.constexpr, M: tl.constexpr):
    """`[BLOCK, M]` -> its M columns."""
    even, odd = tl.split(tl.reshape(x, (BLOCK, M // 2, 2)))
    if M == 2:
        return tl.reshape(even, (BLOCK,)), tl.reshape(odd, (BLOCK,))
    elif M == 4:
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d
    elif M == 8:
        a, c, e, g = _split(even, BLOCK, 4)
        b, d, f, h = _split(odd, BLOCK, 4)
        return a, b, c, d, e, f, g, h
    else:
        a, c, e, g, i, k, m, o = _split(even, BLOCK, 8)
        b, d, f, h, j, ll, n, p = _split(odd, BLOCK, 8)
        return a, b, c, d, e, f, g, h, i, j, k, ll, m, n, o, p


@triton.jit
def _joined(x, BLOCK: tl.constexpr, M: tl.constexpr):
    """M columns -> `[BLOCK, M]`; the inverse of `_split`."""
    if M == 2:
        return tl.join(x[0], x[1])
    elif M == 4:
        return tl.reshape(tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3])), (BLOCK, 4))
    elif M == 8:
        even = _joined((x[0], x[2], x[4], x[6]), BLOCK, 4)
        odd = _joined((x[1], x[3], x[5], x[7]), BLOCK, 4)
        return tl.reshape(tl.join(even, odd), (BLOCK, 8))
    else:
        even = _joined((x[0], x[2], x[4], x[6], x[8], x[10], x[12], x[14]), BLOCK, 8)
        odd = _joined((x[1], x[3], x[5], x[7], x[9], x[11], x[13], x[15]), BLOCK, 8)
        return tl.reshape(tl.join(even, odd), (BLOCK, 16))


@triton.jit
def _groups(table, site, BLOCK: tl.constexpr, M: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Where each group of a tile begins, `[BLOCK]`, the distance of its entries, and which groups exist."""
    row_of = table + site * FIELDS
    tile = tl.program_id(0) - tl.load(row_of + 5)
    if TRANSPOSED:
        # Groups run down the stored rows: the j-th entries of neighbouring groups lie side by side.
        columns = tl.multiple_of(tl.load(row_of + 7), 16)
        across = tl.cdiv(columns, BLOCK)
        column = tile % across * BLOCK + tl.arange(0, BLOCK)
        return tile // across * (columns * M) + column, columns, column < columns
    else:
        group = tile * BLOCK + tl.arange(0, BLOCK)
        return group * M, 1, group < tl.load(row_of + 6)


@triton.jit
def _load(base, start, out, there, BLOCK: tl.constexpr, M: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The M entries of each group, as M tensors `[BLOCK]`."""
    if TRANSPOSED:
        found = (tl.load(base + start, mask=there, other=0),)
        for j in tl.static_range(1, M):
            found = found + (tl.load(base + start + j * out, mask=there, other=0),)
        return found
    else:
        offsets = start[:, None] + tl.arange(0, M)[None, :]
        return _split(tl.load(base + offsets, mask=there[:, None], other=0), BLOCK, M)


@triton.jit
def _store(base, start, out, there, x, BLOCK: tl.constexpr, M: tl.constexpr, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        for j in tl.static_range(M):
            tl.store(base + start + j * out, x[j], mask=there)
    else:
        offsets = start[:, None] + tl.arange(0, M)[None, :]
        tl.store(base + offsets, _joined(x, BLOCK, M), mask=there[:, None])


@triton.jit
def _rank(x, ties, i: tl.constexpr, M: tl.constexpr, TIES: tl.constexpr):
    """How many entries of the group come before the i-th: larger, or equal with a larger tie, or equal and earlier."""
    before = tl.zeros_like(x[0]).to(tl.int32)
    for j in tl.static_range(M):
        if j != i:
            ahead = x[j] > x[i]
            if TIES:
                ahead = ahead | ((x[j] == x[i]) & (ties[j] > ties[i]))
                if j < i:
                    ahead = ahead | ((x[j] == x[i]) & (ties[j] == ties[i]))
            else:
                if j < i:
                    ahead = x[j] >= x[i]
            before += ahead.to(tl.int32)
    return before


@triton.jit
def update(
    table, owner, weights, statistics, masks, hards, views, means, spread, partial, scale,
    steepness, structure_mix, mid_push, mask_rate, margin, softness,
    KEEP: tl.constexpr, M: tl.constexpr, TRANSPOSED: tl.constexpr, CRITERION: tl.constexpr, LOG: tl.constexpr,
    MIDPOINT: tl.constexpr, BLEND: tl.constexpr, PULL_GATE: tl.constexpr, FIXED: tl.constexpr,
    HYSTERESIS: tl.constexpr, BY_SCORES: tl.constexpr, ABOVE_HALF: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Lines 8-12 of algorithm 1 and the quenched view, for one tile of `BLOCK` groups.

    Reported are sums over the tile: entries of the hard mask that flipped, of m between 0.1 and 0.9, and |m - m_hat|. A
    group with a score that is not finite is left as it is, and its tile reports NaN flips.
    """
    tile = tl.program_id(0)
    site = tl.load(owner + tile).to(tl.int64)
    start, out, there = _groups(table, site, BLOCK, M, TRANSPOSED)
    w = _load(_address(table, site, 0, weights), start, out, there, BLOCK, M, TRANSPOSED)
    h = w
    if CRITERION == OBD:
        h = _load(_address(table, site, 1, statistics), start, out, there, BLOCK, M, TRANSPOSED)
    mean, narrowing = tl.load(spread + site * SUMS), tl.load(spread + site * SUMS + 1)
    eps = tl.load(means + site * SUMS)

    stored = _load(_address(table, site, 2, masks), start, out, there, BLOCK, M, TRANSPOSED)
    if not PACKED:
        kept = _load(_address(table, site, 3, hards), start, out, there, BLOCK, M, TRANSPOSED)
    z, m, old = (), (), ()
    good = there
    for i in tl.static_range(M):
        s = _score(w[i].to(tl.float32), h[i].to(tl.float32) * scale, eps, CRITERION)
        zi = (_centred(s, means, site, LOG) - mean) * narrowing
        good = good & (tl.abs(zi) < float("inf"))
        z = z + (zi,)
        if PACKED:
            value = stored[i].to(tl.int32)
            old = old + (value < 0,)
            m = m + (tl.where(value < 0, -1 - value, value).to(tl.float32) * (1.0 / 32767.0),)
        else:
            old = old + (kept[i] != 0,)
            m = m + (stored[i],)

    nth, following = tl.zeros_like(z[0]), tl.zeros_like(z[0])
    target = ()
    for i in tl.static_range(M):
        place = _rank(z, z, i, M, False)
        nth += tl.where(place == KEEP - 1, z[i], 0.0)
        following += tl.where(place == KEEP, z[i], 0.0)
        target = target + (place < KEEP,)
    if FIXED:
        target = old
    elif HYSTERESIS:
        held = ()
        for i in tl.static_range(M):
            held = held + (z[i] + margin * old[i].to(tl.float32),)
        target = ()
        for i in tl.static_range(M):
            target = target + (_rank(held, held, i, M, False) < KEEP,)
    tau = 0.5 * (nth + following) if MIDPOINT else nth

    gate = ()
    for i in tl.static_range(M):
        g = 1.0 / (1.0 + tl.exp(-(z[i] - tau) * steepness))
        if BLEND:
            g = _lerp(g, target[i].to(tl.float32), structure_mix)
        gate = gate + (g,)
    new = ()
    for i in tl.static_range(M):
        pull = target[i].to(tl.float32)
        if PULL_GATE:
            pull = (_rank(gate, gate, i, M, False) < KEEP).to(tl.float32)
        pushed = tl.minimum(tl.maximum(gate[i] - mid_push * (m[i] - pull), 0.0), 1.0)
        value = _lerp(m[i], pushed, mask_rate)
        if PACKED:  # to the nearest step: what is ranked, seen and stored is one number
            value = (value * 32767.0 + 0.5).to(tl.int32).to(tl.float32) * (1.0 / 32767.0)
        # Where nothing can be ranked, what was there is written again: masked stores would go entry by entry.
        new = new + (tl.where(good, value, m[i]),)

    packed, view, bits = (), (), ()
    flips = tl.zeros((BLOCK,), dtype=tl.float32)
    middle, gap = flips, flips
    for i in tl.static_range(M):
        if BY_SCORES:
            keeps = target[i]
        else:
            keeps = _rank(new, z, i, M, True) < KEEP
        keeps = (good & keeps) | ((good == 0) & old[i])
        flips += (keeps != old[i]).to(tl.float32)
        middle += ((new[i] > 0.1) & (new[i] < 0.9)).to(tl.float32)
        gap += tl.abs(new[i] - keeps.to(tl.float32))
        if PACKED:
            whole = (new[i] * 32767.0 + 0.5).to(tl.int32)
            packed = packed + (tl.where(keeps, -1 - whole, whole).to(tl.int16),)
        else:
            bits = bits + (keeps.to(tl.int8),)
            shown = keeps
            if ABOVE_HALF:
                shown = new[i] > 0.5
            view = view + (_lerp(shown.to(tl.float32), new[i], softness),)
    if PACKED:
        _store(_address(table, site, 2, masks), start, out, there, packed, BLOCK, M, TRANSPOSED)
    else:
        _store(_address(table, site, 2, masks), start, out, there, new, BLOCK, M, TRANSPOSED)
        _store(_address(table, site, 3, hards), start, out, there, bits, BLOCK, M, TRANSPOSED)
        _store(_address(table, site, 4, views), start, out, there, view, BLOCK, M, TRANSPOSED)
    flips = tl.where(good, flips, tl.where(there, float("nan"), 0.0))
    tl.store(partial + tile * SUMS, tl.sum(flips))
    tl.store(partial + tile * SUMS + 1, tl.sum(tl.where(there, middle, 0.0)))
    tl.store(partial + tile * SUMS + 2, tl.sum(tl.where(there, gap, 0.0)))


@triton.jit
def _lerp(a, b, share):
    """a + share (b - a), as torch rounds it: from the nearer end, so that a share of 1 gives b exactly."""
    return tl.where(share < 0.5, a + share * (b - a), b - (b - a) * (1.0 - share))


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
