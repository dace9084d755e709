"""Triton kernel of SparseGPT's column sweep: one block of columns, many rows, one launch.

`sparsity/fused_sweep.py` decides who comes here. A program holds a few rows of the block in registers from its first
column to its last. Every row is worked on alone and nothing is added atomically, so that the same inputs give the same
bits, whatever rows stand beside them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sweep_columns(
    weights, keeps, errors, upper, scales, inverses, bad, rows, inputs, begin, width, first,
    RUN: tl.constexpr, CHOOSE: tl.constexpr, GROUP: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RUN columns of `weights` `[rows, inputs]` from begin + `first` on, moving those after them in their block.

    The block is the `width` columns from `begin` on; `upper` is U `[inputs, inputs]`, `scales` are its U_jj and
    `inverses` 1 / U_jj. Writes the block's weights and keep mask (int8 `[rows, inputs]`) and the errors of its columns,
    `[width, rows]`. With CHOOSE the survivors are the KEEP of every GROUP columns with the largest w^2 / U_jj^2 when
    the group's first column is reached, the lower place first among equals, and `bad` `[programs]` is set where a score
    is not finite; without it they are what the keep mask says.
    """
    inputs = tl.cast(inputs, tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    there = (row < rows)[:, None] & inside[None, :]
    places = row[:, None] * inputs + begin + cols[None, :]
    w = tl.load(weights + places, mask=there, other=0.0)
    keep = tl.load(keeps + places, mask=there, other=1) != 0
    scale = tl.load(scales + begin + cols, mask=inside, other=1.0)
    if CHOOSE:
        wrong = tl.zeros((ROWS, BLOCK), dtype=tl.int32)
        for done in range(0, RUN, GROUP):
            group = first + done
            mine = (cols >= group) & (cols < group + GROUP)
            quotient = tl.div_rn(w, tl.broadcast_to(scale[None, :], (ROWS, BLOCK)))
            score = tl.where(mine[None, :], quotient * quotient, 0.0)
            wrong |= (score != score) | (score == float("inf"))
            rank = tl.zeros((ROWS, BLOCK), dtype=tl.int32)
            for place in range(GROUP):
                j = group + place
                rival = tl.sum(tl.where((cols == j)[None, :], score, 0.0), axis=1)[:, None]
                rank += ((rival > score) | ((rival == score) & (cols > j)[None, :])).to(tl.int32)
            keep = tl.where(mine[None, :], rank < KEEP, keep)
            for place in range(GROUP):
                j = group + place
                w = _carry(w, keep, errors, upper, inverses, row, rows, inputs, begin, cols, inside, j)
        tl.store(bad + tl.program_id(0), tl.max(tl.max(wrong, axis=1), axis=0))
    else:
        for done in range(RUN):
            j = first + done
            w = _carry(w, keep, errors, upper, inverses, row, rows, inputs, begin, cols, inside, j)
    swept = (cols >= first) & (cols < first + RUN)
    tl.store(weights + places, tl.where(swept[None, :] & ~keep, 0.0, w), mask=there)
    if CHOOSE:
        tl.store(keeps + places, keep.to(tl.int8), mask=there)


@triton.jit
def _carry(w, keep, errors, upper, inverses, row, rows, inputs, begin, cols, inside, j):
    """w after the error of column j, e = w_j / U_jj where it is pruned, has moved the columns that follow."""
    lost = tl.sum(tl.where((cols == j)[None, :] & ~keep, w, 0.0), axis=1) * tl.load(inverses + begin + j)
    tl.store(errors + j * rows + row, lost, mask=row < rows)
    u = tl.load(upper + (begin + j) * inputs + begin + cols, mask=inside & (cols > j), other=0.0)
    return w - lost[:, None] * u[None, :]
