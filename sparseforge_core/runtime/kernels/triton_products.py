"""The products in Triton, on a weight as it is packed: the plainer second choice, asked for as backend "triton".

A group of four inputs is one 32-bit word with its two kept values, and four bits of places.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads the arguments of its functions itself, and has no types for them.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _halves(words, BF16: tl.constexpr):
    """The two kept values of each 32-bit word, as float32."""
    if BF16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = ((words >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _places(at, outputs, group, STRIDE: tl.constexpr, inside, M: tl.constexpr, G: tl.constexpr):
    """Four bits for each of `[M, G]` groups, from 32-bit words of eight."""
    word = group // 8 + tl.arange(0, G // 8)
    words = tl.load(at + outputs[:, None] * STRIDE + word[None, :], mask=inside & (word < STRIDE)[None, :], other=0)
    spread = words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]
    return tl.reshape(spread, (M, G)) & 15


@triton.jit
def _pick(place, x0, x1, x2, x3):
    lower = tl.where(place == 0, x0, x1)
    return tl.where(place < 2, lower, tl.where(place == 2, x2, x3))


@triton.jit
def _vector(
    x_at, values_at, places_at, bias_at, y_at, out,
    GROUPS: tl.constexpr, BIAS: tl.constexpr, BF16: tl.constexpr, M: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """One row of x: `M` outputs per program, `G` groups at a time."""
    outputs = tl.program_id(0) * M + tl.arange(0, M)
    inside = (outputs < out)[:, None]
    total = tl.zeros((M, G), dtype=tl.float32)
    for first in range(0, GROUPS, G):
        group = first + tl.arange(0, G)
        here = group < GROUPS
        words = tl.load(
            values_at + outputs[:, None].to(tl.int64) * GROUPS + group[None, :], mask=inside & here[None, :], other=0
        )
        places = _places(places_at, outputs, first, GROUPS // 8, inside, M, G)
        x0 = tl.load(x_at + 4 * group, mask=here, other=0.0).to(tl.float32)[None, :]
        x1 = tl.load(x_at + 4 * group + 1, mask=here, other=0.0).to(tl.float32)[None, :]
        x2 = tl.load(x_at + 4 * group + 2, mask=here, other=0.0).to(tl.float32)[None, :]
        x3 = tl.load(x_at + 4 * group + 3, mask=here, other=0.0).to(tl.float32)[None, :]
        low, high = _halves(words, BF16)
        total += low * _pick(places & 3, x0, x1, x2, x3) + high * _pick(places >> 2, x0, x1, x2, x3)
    y = tl.sum(total, 1)
    if BIAS:
        y += tl.load(bias_at + outputs, mask=outputs < out, other=0.0).to(tl.float32)
    tl.store(y_at + outputs, y.to(y_at.dtype.element_ty), mask=outputs < out)


@triton.jit
def _matrix(
    x_at, values_at, places_at, bias_at, y_at, out, rows,
    GROUPS: tl.constexpr, BIAS: tl.constexpr, BF16: tl.constexpr, M: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """`N` rows of x: the weight's tile `[M, 4 G]` is unpacked in registers and multiplied by the tensor cores."""
    outputs = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1) * N + tl.arange(0, N)
    inside = (outputs < out)[:, None]
    total = tl.zeros((M, N), dtype=tl.float32)
    for first in range(0, GROUPS, G):
        group = first + tl.arange(0, G)
        words = tl.load(
            values_at + outputs[:, None].to(tl.int64) * GROUPS + group[None, :],
            mask=inside & (group < GROUPS)[None, :],
            other=0,
        )
        places = _places(places_at, outputs, first, GROUPS // 8, inside, M, G)
        low, high = _halves(words, BF16)
        one, two = places & 3, places >> 2
        d0 = tl.where(one == 0, low, 0.0)
        d1 = tl.where(one == 1, low, tl.where(two == 1, high, 0.0))
        d2 = tl.where(one == 2, low, tl.where(two == 2, high, 0.0))
        d3 = tl.where(two == 3, high, 0.0)
        tile = tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), (M, 4 * G)).to(x_at.dtype.element_ty)
        column = 4 * first + tl.arange(0, 4 * G)
        x = tl.load(
            x_at + row[None, :] * (4 * GROUPS) + column[:, None],
            mask=(row < rows)[None, :] & (column < 4 * GROUPS)[:, None],
            other=0.0,
        )
        total = tl.dot(tile, x, total)
    if BIAS:
        total += tl.load(bias_at + outputs, mask=outputs < out, other=0.0).to(tl.float32)[:, None]
    y = y_at + row[None, :] * out + outputs[:, None]
    tl.store(y, total.to(y_at.dtype.element_ty), mask=inside & (row < rows)[None, :])


def run(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Fill `out [rows, out]` from `x [rows, in]` and a packed weight: values `[out, in/2]`, bytes `[out, in/8]`."""
    rows, count = out.shape
    groups, words, marks = x.shape[1] // 4, values.view(torch.int32), places.view(torch.int32)
    held = out if bias is None else bias  # not read without a bias
    fixed = {"GROUPS": groups, "BIAS": bias is not None, "BF16": x.dtype == torch.bfloat16}
    if rows == 1:
        _vector[(triton.cdiv(count, 4),)](x, words, marks, held, out, count, M=4, G=256, **fixed, num_warps=4)
        return
    n = max(16, triton.next_power_of_2(min(rows, 64)))
    grid = (triton.cdiv(count, 64), triton.cdiv(rows, n))
    _matrix[grid](x, words, marks, held, out, count, rows, M=64, G=32, N=n, **fixed, num_warps=4, num_stages=3)
