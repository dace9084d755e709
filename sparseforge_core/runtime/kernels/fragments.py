"""The order in which the tensor cores take a 2:4 weight: a permutation of the packed format, and its inverse.

One sparse matrix instruction multiplies 16 outputs by 32 inputs of a weight, of which each of 32 lanes holds 8 kept
values (16 bytes) and, for two instructions, one 32-bit word of places. A block of 16 outputs x 256 inputs is eight
such steps, so a lane reads a block as eight 16-byte words of values and one of places, and a warp reads it as 4,096
and 512 contiguous bytes. The places need no new encoding: the packed format's two bits each, first place lowest, are
those of the instruction. With lane = 4 q + t, and groups counted within a step:

    values  [out/16, in/256, step 8, lane 32, 8]: groups t and t+4 of outputs q and q+8, in the order
            (q, t), (q+8, t), (q, t+4), (q+8, t+4), two values each
    places  [out/16, in/256, lane 32, word 4] int32: word w belongs to step 2w + t//2 and holds groups
            4(t%2) to 4(t%2)+3 of output q in its low half, of output q+8 in its high half

Inputs are filled up to a multiple of 256 with zeros in the places 0 and 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseforge_core.runtime.kernels.support import COLUMNS, ROWS

STEPS = 8
"""Instructions along the inputs of one block."""

EMPTY = 0x44
"""Two groups that keep the places 0 and 1."""


def to_fragments(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[out, in/2]` and index bytes `[out, in/8]` in the order of the module's docstring."""
    out, kept = values.shape
    blocks = -(-2 * kept // COLUMNS)
    missing = blocks * COLUMNS // 2 - kept
    values = torch.nn.functional.pad(values, (0, missing))
    indices = torch.nn.functional.pad(indices, (0, missing // 4), value=EMPTY)
    tiles = out // ROWS
    # [tile, half, q, block, step, upper, t, pair] -> [tile, block, step, q, t, upper, half, pair]
    spread = values.reshape(tiles, 2, 8, blocks, STEPS, 2, 4, 2).permute(0, 3, 4, 2, 6, 5, 1, 7)
    # [tile, half, q, block, word, t//2, t%2, byte] -> [tile, block, q, t//2, t%2, word, half, byte]
    places = indices.reshape(tiles, 2, 8, blocks, STEPS // 2, 2, 2, 2).permute(0, 3, 2, 5, 6, 4, 1, 7)
    words = places.contiguous().reshape(tiles, blocks, 32, 16).view(torch.int32)
    return spread.contiguous().reshape(tiles, blocks, STEPS, 32, 8), words


def from_fragments(values: Tensor, words: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """The packed values `[out, in/2]` and index bytes `[out, in/8]` again, without what was filled up."""
    tiles, blocks = values.shape[:2]
    spread = values.reshape(tiles, blocks, STEPS, 8, 4, 2, 2, 2).permute(0, 6, 3, 1, 2, 5, 4, 7)
    places = words.view(torch.uint8).reshape(tiles, blocks, 8, 2, 2, STEPS // 2, 2, 2).permute(0, 6, 2, 1, 5, 3, 4, 7)
    out = tiles * ROWS
    return (
        spread.reshape(out, -1)[:, : inputs // 2].contiguous(),
        places.reshape(out, -1)[:, : inputs // 8].contiguous(),
    )
