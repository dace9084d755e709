"""Triton kernel of AdamW with moments in 8 bits: everything of all weights is read and written once, in one launch.

What is computed is said by `EightBitAdamW._move`; `eight_bit.py` decides what comes here.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS: tl.constexpr = tl.constexpr(9)
"""Columns of the table of weights: where weight, gradient, codes and scales of both moments and the count of steps
begin, as distances from the first weight's; the weight's first program; its number of entries."""


MAGIC: tl.constexpr = tl.constexpr(8388608.0)
MAGIC_BITS: tl.constexpr = tl.constexpr(0x4B000000)
SIGNED_MAGIC: tl.constexpr = tl.constexpr(12582912.0)
"""2^23, its bits, and 1.5 times as much: a sum with a whole number has that number in its low bits, with its sign for
the last. A GPU adds eight times as fast as it converts."""


@triton.jit
def _begin(row_of, field: tl.constexpr, anchor):
    return anchor + tl.multiple_of(tl.load(row_of + field), 16)


@triton.jit
def move(
    table, owner, weights, gradients, first_codes, first_scales, second_codes, second_scales, steps,
    first_powers, second_powers,
    rate, kept, first_decay, first_rest, second_decay, second_rest, log_first, log_second, eps, least,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS blocks, of entries that share their scales, of one weight.

    `kept` is 1 - lr wd, `*_rest` 1 - beta, `log_*` ln beta, `least` what a scale of 0 is divided by; `*_powers` are
    the powers of ten of a code's decades, by the logarithm of how many codes these have.
    """
    program = tl.program_id(0)
    row_of = table + tl.load(owner + program).to(tl.int64) * FIELDS
    weight, gradient = _begin(row_of, 0, weights), _begin(row_of, 1, gradients)
    first_codes, first_scales = _begin(row_of, 2, first_codes), _begin(row_of, 3, first_scales)
    second_codes, second_scales = _begin(row_of, 4, second_codes), _begin(row_of, 5, second_scales)
    size = tl.multiple_of(tl.load(row_of + 8), 16)
    rows = (program - tl.load(row_of + 7)) * ROWS + tl.arange(0, ROWS)
    place = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = place < size
    begun = rows * BLOCK < size
    g = tl.load(gradient + place, mask=there, other=0.0)
    code = tl.load(first_codes + place, mask=there, other=0).to(tl.int32)
    scale = tl.load(first_scales + rows, mask=begun, other=0.0)[:, None]
    magnitude = _magnitude(tl.abs(code), first_powers, 7) * scale
    first = tl.where(code < 0, -magnitude, magnitude)
    code = tl.load(second_codes + place, mask=there, other=0).to(tl.int32)
    scale = tl.load(second_scales + rows, mask=begun, other=0.0)[:, None]
    second = _magnitude(code, second_powers, 8) * scale
    first += first_rest * (g - first)
    second = second * second_decay + second_rest * g * g
    top = tl.max(tl.abs(first), 1)
    code = _code(tl.abs(first) * (1.0 / tl.maximum(top, least))[:, None], 7)
    code = tl.where(first < 0, -code, code)
    tl.store(first_codes + place, (code + SIGNED_MAGIC).to(tl.int32, bitcast=True).to(tl.int8), mask=there)
    tl.store(first_scales + rows, top, mask=begun)
    top = tl.max(second, 1)
    code = _code(second * (1.0 / tl.maximum(top, least))[:, None], 8)
    code = tl.where(second > 0, tl.maximum(code, 1.0), code)
    tl.store(second_codes + place, (code + MAGIC).to(tl.int32, bitcast=True).to(tl.uint8), mask=there)
    tl.store(second_scales + rows, top, mask=begun)
    count = tl.load(_begin(row_of, 6, steps))
    slope = rate / (1.0 - tl.exp(count * log_first))
    root = tl.sqrt(second) / tl.sqrt(1.0 - tl.exp(count * log_second)) + eps
    w = tl.load(weight + place, mask=there, other=0.0)
    tl.store(weight + place, w * kept - first / root * slope, mask=there)


@triton.jit
def _magnitude(code, powers, BITS: tl.constexpr):
    """What a code without its sign stands for, in [0, 1]: computed, for entries of a table are had one after another.

    With n the power of two at or below the code, it is the (code - n)-th of n in its decade (`eight_bit.magnitudes`).
    """
    last: tl.constexpr = 2**BITS - 1
    number = (code | MAGIC_BITS).to(tl.float32, bitcast=True) - MAGIC
    bits = number.to(tl.int32, bitcast=True) & 0x7F800000
    count = bits.to(tl.float32, bitcast=True)
    each = (0x7F000000 - bits).to(tl.float32, bitcast=True)  # 1 / n
    power = tl.load(powers + tl.maximum((bits >> 23) - 127, 0))
    found = power * (0.1 + 0.9 * each * (number - count + 0.5))
    return tl.where(code == 0, 0.0, tl.where(code == last, 1.0, found))


@triton.jit
def _code(x, BITS: tl.constexpr):
    """The code, as a float, of the magnitude nearest to x in [0, 1]: `quantised`'s, to the rounding of a tie.

    A decade's n codes are evenly spaced, so that the place in it says the code, but for its ends: what is nearest to
    the last of the decade below, and the largest code of all, which stands for 1 itself.
    """
    most: tl.constexpr = 1.0 * 2 ** (BITS - 1)
    count = tl.full(x.shape, most, tl.float32)
    small = x < 1e-4
    x, count = tl.where(small, x * 1e4, x), tl.where(small, count * 0.0625, count)
    small = x < 1e-2
    x, count = tl.where(small, x * 1e2, x), tl.where(small, count * 0.25, count)
    small = (x < 0.1) & (count > 1.0)
    x, count = tl.where(small, x * 10.0, x), tl.where(small, count * 0.5, count)
    place = (x - 0.1) * (count * (1.0 / 0.9))
    whole = (place + MAGIC) - MAGIC
    whole = tl.where(whole > place, whole - 1.0, whole)
    whole = tl.minimum(tl.maximum(whole, 0.0), count - 1.0)
    below = place < tl.where(count == 1.0, 0.175 / 0.9, 0.2)
    below = below | ((count == most) & (whole == most - 1.0) & (place < most - 0.75))
    return count + whole - tl.where(below, 1.0, 0.0)
