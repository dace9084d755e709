"""Triton kernel of AdamW with moments in 8 bits: everything of all weights is read and written once, in one launch.

What is computed is said by `EightBitAdamW._move`; `eight_bit.py` decides what comes here. A warp works on a block of
entries that share their scales, four at a time: their codes are one word. Codes and what they stand for are computed
in few instructions with the numbers of their decade, from a table of `DECADES` that lies in one line of the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparseforge_core.sparsity.group_kernels import bytes_of, load, log2, store

FIELDS: tl.constexpr = tl.constexpr(9)
"""Columns of the table of weights: where weight, gradient, codes and scales of both moments and the count of steps
begin, as distances from the first weight's; the weight's first program; its number of entries."""

MAGIC: tl.constexpr = tl.constexpr(8388608.0)
MAGIC_BITS: tl.constexpr = tl.constexpr(0x4B000000)
"""2^23 and its bits: a sum with a number below it has its whole part in its low bits. A GPU adds eight times as fast as
it converts."""


@triton.jit
def _begin(row_of, field: tl.constexpr, anchor):
    return anchor + tl.multiple_of(tl.load(row_of + field), 16)


@triton.jit
def move(
    table, owner, weights, gradients, first_codes, first_scales, second_codes, second_scales, steps,
    first_decades, second_decades,
    rate, kept, first_rest, second_decay, second_rest, log_first, log_second, eps, least,
    EVEN: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """REPEAT blocks of one weight.

    `kept` is 1 - lr wd, `*_rest` 1 - beta, `log_*` ln beta, `least` what a scale of 0 is divided by; `*_decades` are
    `eight_bit.decades` of each moment. With EVEN all blocks of all programs exist, and are full.
    """
    program = tl.program_id(0)
    row_of = table + tl.load(owner + program).to(tl.int64) * FIELDS
    weight, gradient = _begin(row_of, 0, weights), _begin(row_of, 1, gradients)
    first_codes, first_scales = _begin(row_of, 2, first_codes), _begin(row_of, 3, first_scales)
    second_codes, second_scales = _begin(row_of, 4, second_codes), _begin(row_of, 5, second_scales)
    size = tl.multiple_of(tl.load(row_of + 8), 16)
    first_block = (program - tl.load(row_of + 7)) * REPEAT
    count = tl.load(_begin(row_of, 6, steps))
    slope = rate / (1.0 - tl.exp(count * log_first))
    widening = 1.0 / tl.sqrt(1.0 - tl.exp(count * log_second))
    fours: tl.constexpr = BLOCK // 4
    for turn in range(REPEAT):
        block = first_block + turn
        place = tl.multiple_of(block * BLOCK, BLOCK)
        there = place + 4 * tl.arange(0, fours) < size
        begun = place < size
        g = load(gradient, place, 0, there, fours, 4, False, EVEN)
        w = load(weight, place, 0, there, fours, 4, False, EVEN)
        words = (first_codes + place).to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, fours)
        firsts = tl.load(words) if EVEN else tl.load(words, mask=there, other=0)
        scale = tl.load(first_scales + block, mask=begun, other=0.0)
        first = ()
        for j in tl.static_range(4):
            code = (firsts << (24 - 8 * j)) >> 24
            magnitude = _magnitude(tl.abs(code), first_decades, 7)
            old = ((magnitude.to(tl.int32, bitcast=True)) | (code & -2147483648)).to(tl.float32, bitcast=True) * scale
            new = old + first_rest * (g[j] - old)
            first = first + (new,)
            if j == 0:
                most = tl.abs(new)
            else:
                most = tl.maximum(most, tl.abs(new))
        top = tl.max(most)
        tl.store(first_scales + block, top, mask=begun)
        share = 1.0 / tl.maximum(top, least)
        codes = ()
        for j in tl.static_range(4):
            code = (_code(tl.abs(first[j]) * share, first_decades, 7) + (MAGIC - 0.5)).to(tl.int32, bitcast=True)
            codes = codes + (tl.where(first[j] < 0, -code, code),)
        word = _word(codes)
        if EVEN:
            tl.store(words, word)
        else:
            tl.store(words, word, mask=there)

        words = (second_codes + place).to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, fours)
        seconds = tl.load(words) if EVEN else tl.load(words, mask=there, other=0)
        scale = tl.load(second_scales + block, mask=begun, other=0.0)
        second = ()
        for j in tl.static_range(4):
            old = _magnitude((seconds >> (8 * j)) & 255, second_decades, 8) * scale
            new = old * second_decay + second_rest * g[j] * g[j]
            second = second + (new,)
            if j == 0:
                most = new
            else:
                most = tl.maximum(most, new)
        top = tl.max(most)
        tl.store(second_scales + block, top, mask=begun)
        share = 1.0 / tl.maximum(top, least)
        codes, moved = (), ()
        for j in tl.static_range(4):
            code = tl.maximum(_code(second[j] * share, second_decades, 8), tl.where(second[j] > 0, 1.5, 0.5))
            codes = codes + ((code + (MAGIC - 0.5)).to(tl.int32, bitcast=True),)
            root = tl.sqrt(second[j]) * widening + eps
            moved = moved + (w[j] * kept - first[j] / root * slope,)
        word = _word(codes)
        if EVEN:
            tl.store(words, word)
        else:
            tl.store(words, word, mask=there)
        store(weight, place, 0, there, moved, fours, 4, False, EVEN)


@triton.jit
def _word(codes):
    """The low bytes of four words, as one."""
    return bytes_of(bytes_of(codes[0], codes[1], 0x0040), bytes_of(codes[2], codes[3], 0x0040), 0x5410)


@triton.jit
def _magnitude(code, decades, BITS: tl.constexpr):
    """What a code without its sign stands for, in [0, 1]: in its decade a multiple and a sum; the last code's is 1."""
    number = (code | MAGIC_BITS).to(tl.float32, bitcast=True) - MAGIC
    decade = decades + tl.maximum((number.to(tl.int32, bitcast=True) >> 23) - 126, 0)
    found = number * tl.load(decade + 32) + tl.load(decade + 48)
    return tl.where(code == 2**BITS - 1, 1.0, found)


@triton.jit
def _code(x, decades, BITS: tl.constexpr):
    """The code, and a fraction, of the magnitude nearest to x in [0, 1]: that of `quantised`, to the rounding of a tie.

    In a decade the code is a multiple of x and a sum, but for its ends: what is nearest to the last code of the decade
    below, and the largest code of all, which stands for 1 itself.
    """
    zeros = (log2(x) * -0.30102999566398120 + (MAGIC - 0.5)).to(tl.int32, bitcast=True) - MAGIC_BITS
    decade = decades + tl.minimum(tl.maximum(zeros, 0), BITS - 1)
    found = x * tl.load(decade) + tl.load(decade + 8)
    found = tl.where(found < tl.load(decade + 16), tl.load(decade + 24), found)
    return found - tl.where(found >= 2**BITS - 1, 0.25, 0.0)
