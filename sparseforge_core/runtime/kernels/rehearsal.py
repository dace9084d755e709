"""Random weights in exact 2:4 on a GPU, to measure with."""

from __future__ import annotations

import torch
from torch import Tensor

PAIRS = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)
"""The six ways to keep two of four: the first place in the low two bits."""


def random_packed(out: int, inputs: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Kept values `[out, in/2]` and index bytes `[out, in/8]`; all six pairs of places are equally likely."""
    values = torch.randn(out, inputs // 2, device=device).to(dtype) / 64
    pairs = torch.tensor(PAIRS, dtype=torch.uint8, device=device)
    nibbles = pairs[torch.randint(0, len(PAIRS), (out, inputs // 4), device=device)]
    return values, nibbles[:, ::2] | nibbles[:, 1::2] << 4
