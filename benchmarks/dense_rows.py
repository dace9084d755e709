"""A strong dense matrix-vector product in Triton: the baseline that 2:4 is held against, under the same conditions.

The residual is added in it and the next kernel begins while it ends, as with the 2:4 kernels; the first tile of the
weight is under way before the kernel ahead has finished.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def one_row(
    x: Tensor, weight: Tensor, residual: Tensor | None, rows: int, width: int, warps: int, early: bool
) -> Tensor:
    """residual + W x for x `[in]` and W `[out, in]`: `rows` outputs a program, `width` inputs at a time."""
    out, inputs = weight.shape
    y = torch.empty(out, dtype=x.dtype, device=x.device)
    early = early and x.is_cuda
    _one_row[(triton.cdiv(out, rows),)](
        x, weight, x if residual is None else residual, y, out, INPUTS=inputs, ROWS=rows,
        WIDTH=min(width, triton.next_power_of_2(inputs)), ADDED=residual is not None, EARLY=early, num_warps=warps,
        launch_pdl=early,
    )  # fmt: skip
    return y


@triton.jit
def _one_row(
    x, weight, residual, y, out, INPUTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ADDED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    real = (row < out)[:, None]
    places = weight + row[:, None].to(tl.int64) * INPUTS + at[None, :]
    if EARLY:
        gdc_launch_dependents()
    tile = tl.load(places, mask=real & (at < INPUTS)[None, :], other=0.0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()
    total = tile.to(tl.float32) * tl.load(x + at, mask=at < INPUTS, other=0.0).to(tl.float32)[None, :]
    for first in range(WIDTH, INPUTS, WIDTH):
        here = first + at < INPUTS
        tile = tl.load(places + first, mask=real & here[None, :], other=0.0, eviction_policy="evict_first")
        total += tile.to(tl.float32) * tl.load(x + first + at, mask=here, other=0.0).to(tl.float32)[None, :]
    found = tl.sum(total, 1)
    if ADDED:
        found += tl.load(residual + row, mask=row < out, other=0.0).to(tl.float32)
    tl.store(y + row, found.to(y.dtype.element_ty), mask=row < out)
