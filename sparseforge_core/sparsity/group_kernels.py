"""What the mask update's kernel does with groups in registers: loading, ranking, and the arithmetic of one instruction.

A group's entries are M tensors `[BLOCK]`. Ranks are counts of beaten entries, added up as floats, and bits become
floats and back by adding 2^23: a GPU has four times as many lanes for additions as for conversions.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

PORTABLE: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1" or torch.version.hip is not None)
"""Whether what runs the kernels knows no PTX; single instructions are then written as Triton's functions."""

FIELDS: tl.constexpr = tl.constexpr(14)
"""Columns of the table of sites: where weight, statistic, mask, hard mask and view begin, the site's first program in
the update, its number of groups, stored row length, tiles in the update, number of entries; of the look at its rows:
length of a row, entries from one to the next, first tile, entries in all."""

MAGIC: tl.constexpr = tl.constexpr(8388608.0)
"""2^23: the sum with a whole number below it has that number in its low bits."""

STEPS: tl.constexpr = tl.constexpr(32767.0)
"""Steps of a packed m, as in `masking.STEPS_OF_M`."""


@triton.jit
def log2(x):
    """log2 of normal numbers, to 2^-22."""
    if PORTABLE:
        return tl.math.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid2(x):
    """1 / (1 + 2^-x) of -x."""
    if PORTABLE:
        return 1.0 / (1.0 + tl.math.exp2(x))
    else:
        power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        below = 1.0 + power
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [below], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def clamped(x, y):
    """x + y, held in [0, 1]; 0 where that is no number."""
    if PORTABLE:
        return tl.where(x + y > 0.0, tl.minimum(x + y, 1.0), 0.0)
    else:
        return tl.inline_asm_elementwise(
            "add.rn.ftz.sat.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def clamped_product(x, y, z):
    """x y + z, held in [0, 1]; 0 where that is no number."""
    if PORTABLE:
        return clamped(x * y, z)
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.ftz.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def bytes_of(x, y, selector: tl.constexpr):
    """Four bytes of the eight of two words, the lower one's first; each hexadecimal digit of `selector` says which."""
    if PORTABLE:
        both = x.to(tl.uint32, bitcast=True).to(tl.uint64) | (y.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
        found = tl.zeros_like(both)
        for i in tl.static_range(4):
            found |= ((both >> (((selector >> (4 * i)) & 15) * 8)) & 255) << (8 * i)
        return found.to(tl.uint32).to(tl.int32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,n", [x, y, selector], tl.int32, is_pure=True, pack=1
        )


@triton.jit
def address(table, site, field: tl.constexpr, anchor):
    """Where a site's tensor begins, as a distance from the first site's: so the compiler knows it to be aligned."""
    return anchor + tl.multiple_of(tl.load(table + site * FIELDS + field), 16)


@triton.jit
def _split(x, BLOCK: tl.constexpr, M: tl.constexpr):
    """`[BLOCK, M]` -> its M columns."""
    if M == 1:
        return (tl.reshape(x, (BLOCK,)),)
    elif M == 2:
        return tl.split(x)
    elif M == 4:
        even, odd = tl.split(tl.reshape(x, (BLOCK, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d
    elif M == 8:
        even, odd = tl.split(tl.reshape(x, (BLOCK, 4, 2)))
        a, c, e, g = _split(even, BLOCK, 4)
        b, d, f, h = _split(odd, BLOCK, 4)
        return a, b, c, d, e, f, g, h
    else:
        even, odd = tl.split(tl.reshape(x, (BLOCK, 8, 2)))
        a, c, e, g, i, k, m, o = _split(even, BLOCK, 8)
        b, d, f, h, j, ll, n, p = _split(odd, BLOCK, 8)
        return a, b, c, d, e, f, g, h, i, j, k, ll, m, n, o, p


@triton.jit
def _joined(x, BLOCK: tl.constexpr, M: tl.constexpr):
    """M columns -> `[BLOCK, M]`; the inverse of `_split`."""
    if M == 1:
        return tl.reshape(x[0], (BLOCK, 1))
    elif M == 2:
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
def groups(row_of, tile, BLOCK: tl.constexpr, M: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr):
    """Of a site's tile: its first entry, the distance of a group's entries, and which groups exist, `[BLOCK]`."""
    if TRANSPOSED:
        # Groups run down the stored rows: the j-th entries of neighbouring groups lie side by side.
        columns = tl.multiple_of(tl.load(row_of + 7), 16)
        across = tl.cdiv(columns, BLOCK)
        column = tile % across * BLOCK
        left = BLOCK
        if not EVEN:
            left = tl.where(tile < tl.load(row_of + 8), columns - column, 0).to(tl.int32)
        return tile // across * (columns * M) + column, columns, tl.arange(0, BLOCK) < left
    else:
        left = BLOCK
        if not EVEN:
            left = tl.maximum(tl.minimum(tl.load(row_of + 6) - tile * BLOCK, BLOCK), 0).to(tl.int32)
        return tile * (BLOCK * M), 1, tl.arange(0, BLOCK) < left


@triton.jit
def _places(BLOCK: tl.constexpr, M: tl.constexpr):
    """Distances of a tile's entries from its first, `[BLOCK, M]`."""
    return (tl.arange(0, BLOCK) * M)[:, None] + tl.arange(0, M)[None, :]


@triton.jit
def _read(pointers, there, EVEN: tl.constexpr):
    """What lies there, 0 where nothing does; with EVEN something does everywhere."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=there, other=0)


@triton.jit
def _write(pointers, values, there, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=there)


@triton.jit
def load(base, first, out, there, BLOCK: tl.constexpr, M: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr):
    """The M entries of each group, as M tensors `[BLOCK]`; with EVEN all groups exist."""
    if TRANSPOSED:
        found = (_read(base + first + tl.arange(0, BLOCK), there, EVEN),)
        for j in tl.static_range(1, M):
            found = found + (_read(base + (first + j * out) + tl.arange(0, BLOCK), there, EVEN),)
        return found
    else:
        return _split(_read(base + first + _places(BLOCK, M), there[:, None], EVEN), BLOCK, M)


@triton.jit
def store(
    base, first, out, there, x, BLOCK: tl.constexpr, M: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr
):
    """Write M tensors `[BLOCK]` as the entries of each group."""
    if TRANSPOSED:
        for j in tl.static_range(M):
            _write(base + (first + j * out) + tl.arange(0, BLOCK), x[j], there, EVEN)
    else:
        _write(base + first + _places(BLOCK, M), _joined(x, BLOCK, M), there[:, None], EVEN)


@triton.jit
def load_halves(
    base, first, out, there, BLOCK: tl.constexpr, M: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr
):
    """The M entries of each group, of 16 bits, in the upper or the lower half of words; see `bfloat` and `unpacked`."""
    if TRANSPOSED:
        return load(base.to(tl.pointer_type(tl.int16), bitcast=True), first, out, there, BLOCK, M, TRANSPOSED, EVEN)
    else:
        words = (base + first).to(tl.pointer_type(tl.int32), bitcast=True)
        return _split(_read(words + _places(BLOCK, M // 2), there[:, None], EVEN), BLOCK, M // 2)


@triton.jit
def bfloat(halves, i: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The i-th entry of bfloat16s that `load_halves` loaded, as float32."""
    if TRANSPOSED:
        return halves[i].to(tl.bfloat16, bitcast=True).to(tl.float32)
    elif i % 2:
        return (halves[i // 2] & -65536).to(tl.float32, bitcast=True)
    else:
        return (halves[i // 2] << 16).to(tl.float32, bitcast=True)


@triton.jit
def unpacked(halves, i: tl.constexpr, TRANSPOSED: tl.constexpr):
    """m in steps, and 1.0 where the hard mask keeps, of the i-th entry of what `masking.packed` made."""
    if TRANSPOSED:
        code = halves[i].to(tl.uint16, bitcast=True).to(tl.int32)
    elif i % 2:
        code = (halves[i // 2].to(tl.uint32, bitcast=True) >> 16).to(tl.int32, bitcast=True)
    else:
        code = halves[i // 2] & 65535
    code = code.to(tl.float32)
    return tl.minimum(code, 65535.0 - code), clamped(code, tl.full(code.shape, -32767.0, tl.float32))


@triton.jit
def packed(m, raised, kept):
    """`masking.packed` of m in whole steps, given with and without 2^23, and 1.0 where the hard mask keeps.

    In the low half of a word.
    """
    return (kept * (65535.0 - 2.0 * m) + raised).to(tl.int32, bitcast=True)


@triton.jit
def store_halves(
    base, first, out, there, x, BLOCK: tl.constexpr, M: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr
):
    """Write the low halves of M words `[BLOCK]` as the entries of each group."""
    if TRANSPOSED:
        for j in tl.static_range(M):
            _write(base + (first + j * out) + tl.arange(0, BLOCK), x[j].to(tl.int16), there, EVEN)
    else:
        words = (base + first).to(tl.pointer_type(tl.int32), bitcast=True)
        pairs = ()
        for j in tl.static_range(M // 2):
            pairs = pairs + (bytes_of(x[2 * j], x[2 * j + 1], 0x5410),)
        _write(words + _places(BLOCK, M // 2), _joined(pairs, BLOCK, M // 2), there[:, None], EVEN)


@triton.jit
def _beats(x, ties, i: tl.constexpr, j: tl.constexpr, TIES: tl.constexpr):
    """1.0 where the i-th entry comes before the later j-th: larger, or equal with a tie that is not smaller."""
    if TIES:
        ahead = (x[i] > x[j]) | ((x[i] == x[j]) & (ties[i] >= ties[j]))
    else:
        ahead = x[i] >= x[j]
    return tl.where(ahead, 1.0, 0.0)


@triton.jit
def beaten(x, ties, M: tl.constexpr, TIES: tl.constexpr):
    """How many entries of its group come after each, as floats; of equal ones the earlier comes first."""
    found = ()
    for i in tl.static_range(M):
        if i == 0:
            count = _beats(x, ties, 0, 1, TIES)
        else:
            count = 1.0 * i - _beats(x, ties, 0, i, TIES)
        for j in tl.static_range(1, M):
            if j > i and (i > 0 or j > 1):
                count += _beats(x, ties, i, j, TIES)
            elif j < i:
                count -= _beats(x, ties, j, i, TIES)
        found = found + (count,)
    return found


@triton.jit
def first_of(counts, KEEP: tl.constexpr, M: tl.constexpr):
    """1.0 where so many are beaten that the entry is among the first KEEP, else 0.0."""
    found = ()
    for i in tl.static_range(M):
        found = found + (clamped(counts[i], tl.full(counts[i].shape, KEEP - M + 1, tl.float32)),)
    return found


@triton.jit
def first_of_whole(x, KEEP: tl.constexpr, M: tl.constexpr):
    """1.0 for the KEEP largest of each group, else 0.0, of whole numbers that all differ."""
    if M == 4 and KEEP == 2:
        one, other = _middle(x)
        over = 1.0 - tl.maximum(one, other)
        return clamped(x[0], over), clamped(x[1], over), clamped(x[2], over), clamped(x[3], over)
    else:
        return first_of(beaten(x, x, M, False), KEEP, M)


@triton.jit
def _middle(x):
    """The second and the third of four, in either order."""
    low = tl.maximum(tl.minimum(x[0], x[1]), tl.minimum(x[2], x[3]))
    return low, tl.minimum(tl.maximum(x[0], x[1]), tl.maximum(x[2], x[3]))


@triton.jit
def threshold(x, counts, KEEP: tl.constexpr, M: tl.constexpr, MIDPOINT: tl.constexpr):
    """The KEEP-th largest entry of each group, or what lies midway between it and the next."""
    if M == 4 and KEEP == 2:
        one, other = _middle(x)
        nth = 0.5 * (one + other) if MIDPOINT else tl.maximum(one, other)
    else:
        nth, following = tl.zeros_like(x[0]), tl.zeros_like(x[0])
        for i in tl.static_range(M):
            nth += tl.where(counts[i] == M - KEEP, x[i], 0.0)
            following += tl.where(counts[i] == M - KEEP - 1, x[i], 0.0)
        if MIDPOINT:
            nth = 0.5 * (nth + following)
    return nth
