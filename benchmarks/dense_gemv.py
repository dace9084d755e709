"""Strong dense products of one and of a few rows in Triton, baselines that the 2:4 kernels are held against.

Several outputs per program, wide loads, and the start of the next kernel while this one ends: the first tile of the
weight is on its way before the kernel in front has finished, as in the sparse kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _dense(
    x_at, w_at, y_at, out,
    INPUTS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.arange(0, K)
    w = w_at + outputs[:, None].to(tl.int64) * INPUTS + column[None, :]
    inside = (outputs < out)[:, None]
    if EARLY:
        gdc_launch_dependents()
        tile = tl.load(w, mask=inside & (column < INPUTS)[None, :], other=0.0, eviction_policy="evict_first")
        gdc_wait()
        x = tl.load(x_at + column, mask=column < INPUTS, other=0.0)
        total = tile.to(tl.float32) * x.to(tl.float32)[None, :]
        start = K
    else:
        total = tl.zeros((M, K), dtype=tl.float32)
        start = 0
    for first in range(start, INPUTS, K):
        here = first + column < INPUTS
        tile = tl.load(w + first, mask=inside & here[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(x_at + first + column, mask=here, other=0.0)
        total += tile.to(tl.float32) * x.to(tl.float32)[None, :]
    tl.store(y_at + outputs, tl.sum(total, 1).to(y_at.dtype.element_ty), mask=outputs < out)


CONFIGS = (
    (1, 1024, 4, False),
    *((m, k, warps, True) for m, k, warps in ((1, 1024, 4), (2, 1024, 4), (4, 1024, 8), (1, 4096, 8), (2, 2048, 8))),
)
"""Outputs per program, inputs at a time, warps, and whether it starts early; the best of a dozen on an H100."""


@triton.jit(do_not_specialize=["rows"])
def _dense_rows(
    x_at, w_at, y_at, out, rows,
    INPUTS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * M + tl.arange(0, M)
    row, column = tl.arange(0, N), tl.arange(0, K)
    inside = (outputs < out)[:, None]
    total = tl.zeros((M, N), dtype=tl.float32)
    gdc_launch_dependents()
    gdc_wait()
    for first in range(0, INPUTS, K):
        here = first + column < INPUTS
        tile = tl.load(
            w_at + outputs[:, None].to(tl.int64) * INPUTS + (first + column)[None, :],
            mask=inside & here[None, :],
            other=0.0,
        )
        x = tl.load(
            x_at + row[None, :] * INPUTS + (first + column)[:, None],
            mask=(row < rows)[None, :] & here[:, None],
            other=0.0,
        )
        total = tl.dot(tile, x, total)
    y = y_at + row[None, :] * out + outputs[:, None]
    tl.store(y, total.to(y_at.dtype.element_ty), mask=inside & (row < rows)[None, :])


ROWS_CONFIGS = ((32, 256, 4, 3), (64, 128, 4, 4))
"""Outputs per program, inputs at a time, warps and stages of the loads."""


def dense_rows(x: Tensor, weight: Tensor, out: Tensor, config: tuple[int, int, int, int]) -> None:
    """Fill `out [rows, out]` with `x [rows, in]` times the transpose of `weight [out, in]`, for up to 64 rows."""
    m, k, warps, stages = config
    count, inputs = weight.shape
    n = max(16, triton.next_power_of_2(x.shape[0]))
    grid = (triton.cdiv(count, m),)
    _dense_rows[grid](
        x,
        weight,
        out,
        count,
        x.shape[0],
        INPUTS=inputs,
        M=m,
        K=k,
        N=n,
        num_warps=warps,
        num_stages=stages,
        launch_pdl=True,
    )


def dense_gemv(x: Tensor, weight: Tensor, out: Tensor, config: tuple[int, int, int, bool]) -> None:
    """Fill `out [1, out]` with `x [1, in]` times the transpose of `weight [out, in]`."""
    m, k, warps, early = config
    count, inputs = weight.shape
    grid = (triton.cdiv(count, m),)
    _dense[grid](x, weight, out, count, INPUTS=inputs, M=m, K=k, EARLY=early, num_warps=warps, launch_pdl=early)
