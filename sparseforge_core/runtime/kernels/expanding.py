"""The dense weight of one in fragments, unpacked on its GPU in one pass: for batches where dense is fastest."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparseforge_core.runtime.kernels.nvrtc import Kernel, load
from sparseforge_core.runtime.kernels.support import COLUMNS, ROWS

WARPS = 8
"""Blocks of 16 outputs x 256 inputs per block of threads."""


def expand(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """`[out, in]` bit for bit, pruned places +0. It is a new tensor, and the caller's to let go."""
    dense = values.new_empty(shape)
    kernel, grid = _prepared(*shape, values.dtype, values.device.index)
    kernel(grid, values.data_ptr(), places.data_ptr(), dense.data_ptr())
    return dense


@functools.lru_cache(maxsize=1024)
def _prepared(out: int, inputs: int, dtype: torch.dtype, device: int) -> tuple[Kernel, tuple[int, int]]:
    """The kernel of a shape, built when first asked for, and its blocks of threads."""
    blocks = -(-inputs // COLUMNS)
    constants = {
        "OUT": out,
        "COLUMNS": inputs,
        "BLOCKS": blocks,
        "BF16": int(dtype == torch.bfloat16),
        "WARPS": WARPS,
    }
    kernel = load("expand", tuple(constants.items()), 32 * WARPS, 0, device)
    return kernel, (-(-(out // ROWS * blocks) // WARPS), 1)
