"""The dense weight of one in fragments, unpacked on its GPU in one pass: for batches where dense is fastest."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseforge_core.runtime.kernels.nvrtc import load
from sparseforge_core.runtime.kernels.support import COLUMNS, ROWS

WARPS = 8
"""Blocks of 16 outputs x 256 inputs per block of threads."""


def expand(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """`[out, in]` bit for bit, pruned places +0. It is a new tensor, and the caller's to let go."""
    out, inputs = shape
    blocks = -(-inputs // COLUMNS)
    constants = {
        "OUT": out,
        "COLUMNS": inputs,
        "BLOCKS": blocks,
        "BF16": int(values.dtype == torch.bfloat16),
        "WARPS": WARPS,
    }
    kernel = load("expand", tuple(constants.items()), 32 * WARPS, 0, values.device.index)
    dense = values.new_empty(out, inputs)
    kernel((-(-(out // ROWS * blocks) // WARPS), 1), values, places, dense)
    return dense
