"""Triton kernel of AdamW with moments in 8 bits: everything of all weights is read and written once, in one launch.

What is computed is said by `EightBitAdamW._move`; `eight_bit.py` decides what comes here.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS: tl.constexpr = tl.constexpr(9)
"""Columns of the table of weights: where weight, gradient, codes and scales of both moments and the count of steps
begin, as distances from the first weight's; the weight's first program; its number of entries."""


@triton.jit
def _begin(row_of, field: tl.constexpr, anchor):
    return anchor + tl.multiple_of(tl.load(row_of + field), 16)


@triton.jit
def move(
    table, owner, weights, gradients, first_codes, first_scales, second_codes, second_scales, steps,
    signed, signed_bounds, unsigned, unsigned_bounds,
    rate, kept, first_decay, first_rest, second_decay, second_rest, log_first, log_second, eps, least,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS blocks, of entries that share their scales, of one weight.

    `kept` is 1 - lr wd, `*_rest` 1 - beta, `log_*` ln beta, `least` what a scale of 0 is divided by; `signed` and
    `unsigned` are the magnitudes of the codes, `*_bounds` what lies midway between them, between -inf and inf.
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
    magnitude = tl.load(signed + tl.abs(code)) * scale
    first = tl.where(code < 0, -magnitude, magnitude)
    code = tl.load(second_codes + place, mask=there, other=0).to(tl.int32)
    scale = tl.load(second_scales + rows, mask=begun, other=0.0)[:, None]
    second = tl.load(unsigned + code) * scale
    first += first_rest * (g - first)
    second = second * second_decay + second_rest * g * g
    top = tl.max(tl.abs(first), 1)
    share = tl.div_rn(tl.abs(first), tl.maximum(top, least)[:, None])
    code = _nearest(share, signed_bounds, 7)
    tl.store(first_codes + place, tl.where(first < 0, -code, code).to(tl.int8), mask=there)
    tl.store(first_scales + rows, top, mask=begun)
    top = tl.max(second, 1)
    share = tl.div_rn(second, tl.maximum(top, least)[:, None])
    code = _nearest(share, unsigned_bounds, 8)
    tl.store(second_codes + place, tl.where(second > 0, tl.maximum(code, 1), code).to(tl.uint8), mask=there)
    tl.store(second_scales + rows, top, mask=begun)
    count = tl.load(_begin(row_of, 6, steps))
    slope = rate / (1.0 - tl.exp(count * log_first))
    root = tl.sqrt_rn(second) / tl.sqrt(1.0 - tl.exp(count * log_second)) + eps
    w = tl.load(weight + place, mask=there, other=0.0)
    tl.store(weight + place, w * kept - first / root * slope, mask=there)


@triton.jit
def _nearest(x, bounds, BITS: tl.constexpr):
    """The code of the magnitude that is nearest to x in [0, 1].

    `bounds` are -inf, what lies midway between neighbouring magnitudes, and inf: code c stands between the c-th and
    the next. Of a decade with n = 2^(BITS - 1 - zeros) codes these are n to 2n - 1, evenly spaced; rounding puts x one
    code beside its own at most, which two bounds tell. A search would read BITS of them, one after another.
    """
    zeros = tl.floor(-0.30102999566 * tl.log2(tl.maximum(x, 1e-30)))
    zeros = tl.minimum(tl.maximum(zeros, 0.0), BITS - 1.0)
    count = tl.exp2(BITS - 1.0 - zeros)
    place = (x * tl.exp2(3.32192809489 * zeros) - 0.1) * (count / 0.9)
    code = (count + tl.minimum(tl.maximum(tl.floor(place), 0.0), count - 1.0)).to(tl.int32)
    above = tl.where(tl.load(bounds + code + 1) < x, 1, 0)
    return code + above - tl.where(tl.load(bounds + code) >= x, 1, 0)
