"""SparseGPT's column sweep of all weights with the same inputs at once, on a GPU: `second_order.sweep` in few launches.

Rows do not know of each other, so weights with one Hessian are swept as one tall matrix, and a block of columns is one
launch. What the kernel does not cover is said by `refusal`, and is computed by `second_order.sweep`: there is no third
way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparseforge_core.errors import PatternViolation
from sparseforge_core.sparsity.fused import available
from sparseforge_core.sparsity.patterns import GroupPattern, Pattern, Unstructured
from sparseforge_core.sparsity.second_order import Factor, blocks, survivors, sweep

WIDEST = 512
"""Columns of a block that a program holds in registers."""

TILE = 512
"""Entries that a program of one warp holds."""


def refusal(weight: Tensor, pattern: Pattern, width: int, *, on: str = "cuda") -> str | None:
    """Why this sweep is not one for the kernel, or None. `on` is the kind of device that it runs on."""
    if weight.device.type != on:
        return f"its weight is on {weight.device.type}"
    if type(weight.detach()) is not Tensor:
        return "its weight is sharded"
    if not isinstance(pattern, (GroupPattern, Unstructured)):
        return f"pattern {pattern.name} is none that it was made for"
    widest = max(end - begin for begin, end in blocks(weight.shape[1], pattern, width))
    if widest > WIDEST:
        return f"a block has {widest} columns, more than {WIDEST}"
    return None if available() else "Triton is not installed"


def sweep_together(
    weights: Sequence[Tensor], factor: Factor, pattern: Pattern, width: int, *, on: str = "cuda"
) -> list[tuple[Tensor, Tensor]]:
    """`second_order.sweep` of weights `[out, in]` that share inputs and pattern: their updates and keep masks (bool).

    Raises PatternViolation on a score that is not finite.
    """
    if any(refusal(weight, pattern, width, on=on) for weight in weights):
        return [sweep(weight, factor, pattern, width) for weight in weights]
    if isinstance(pattern, Unstructured) and pattern.scope == "matrix":  # there the rows of a matrix compete
        return [_sweep(weight.float(), factor, pattern, width) for weight in weights]
    rows = [weight.shape[0] for weight in weights]
    new, keep = _sweep(torch.cat([weight.float() for weight in weights]), factor, pattern, width)
    return list(zip(new.split(rows), keep.split(rows), strict=True))


def _sweep(weight: Tensor, factor: Factor, pattern: Pattern, width: int) -> tuple[Tensor, Tensor]:
    from sparseforge_core.sparsity import fused_sweep_kernels as kernels

    w = weight.masked_fill(factor.dead, 0.0)
    rows, inputs = w.shape
    upper = factor.upper.contiguous()
    scale = upper.diagonal().contiguous()
    inverse = 1.0 / scale
    keep = torch.ones_like(w, dtype=torch.bool)
    choose = isinstance(pattern, GroupPattern) and pattern.rows == 1
    group, kept = (pattern.cols, pattern.keep) if isinstance(pattern, GroupPattern) else (0, 0)
    cuts = blocks(inputs, pattern, width)
    tile = 2 ** math.ceil(math.log2(max(end - begin for begin, end in cuts)))
    tall = max(1, TILE // tile)
    programs = math.ceil(rows / tall)
    bad = torch.zeros(len(cuts), programs, dtype=torch.int32, device=w.device)
    for block, (begin, end) in enumerate(cuts):
        errors = torch.empty(end - begin, rows, device=w.device)
        run = group if group and not choose else end - begin
        for at in range(begin, end, run):
            if not choose:
                scores = (w[:, at : at + run] / scale[at : at + run]).square()
                keep[:, at : at + run] = survivors(scores, pattern, at, inputs)
            kernels.sweep_columns[(programs,)](
                w, keep.view(torch.int8), errors, upper, scale, inverse, bad[block], rows, inputs, begin, end - begin,
                at - begin, RUN=run, CHOOSE=choose, GROUP=group, KEEP=kept, ROWS=tall, BLOCK=tile, num_warps=1,
                enable_fp_fusion=False,
            )  # fmt: skip
        w[:, end:].addmm_(errors.T, upper[begin:end, end:], alpha=-1.0)
    if bool(bad.any()):
        raise PatternViolation("a score is not finite; nothing can be ranked by it")
    return w, keep
