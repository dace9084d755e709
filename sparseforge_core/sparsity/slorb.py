"""SLoRB, the optional dense side branch of eq. (1): X (W~ + B P)^T.

P sums each run of k consecutive inputs, so B P is B with every column repeated k times: it lives in weight space,
serves every kind of site, and costs `out * in / k` parameters. P is fixed, as the paper says, or trained from there,
as its published code does. The branch stays apart at export, where adding it in would fill the zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparseforge_core.errors import RecipeError
from sparseforge_core.specs import spec


@spec("slorb", revision=2)
class SLoRB:
    """A branch of one trained value for each output row and each block of `k` inputs."""

    k: int = 64
    """Inputs per block; must divide the input dimension of every site (a smaller divisor is used where not)."""
    projection: Literal["fixed", "trained"] = "fixed"
    """Whether P stays the indicator of blocks, which needs no parameters, or is trained from there."""
    fit: Literal["mean", "sum"] = "mean"
    """B at its start: the block means of what is pruned, its least-squares fit; the sums overshoot it k-fold."""
    begin: Literal["quench", "first-mask", "start"] = "quench"
    """When B is fitted to the pruned weights and starts to train: before, at m = 1, nothing is there to be restored.

    'start' trains it from the first step and from zero, as the published code does.
    """

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RecipeError(f"k={self.k}: must be at least 1")

    def block(self, inputs: int) -> int:
        """The largest divisor of `inputs` that is at most k."""
        return next(size for size in range(min(self.k, inputs), 0, -1) if inputs % size == 0)


@dataclass(frozen=True)
class BranchCost:
    """What a branch adds to one site at inference, beside its accuracy."""

    parameters: int
    """Stored values."""
    flops: int
    """Operations per token: additions for a fixed P, multiplications and additions for the rest."""


def cost(branch: Tensor, projection: Tensor | None, inputs: int) -> BranchCost:
    """The cost of B `[..., out, r]` and, if it is stored, P `[..., r, in]`."""
    *lead, out, blocks = branch.shape
    copies = int(torch.Size(lead).numel())
    first = inputs if projection is None else 2 * blocks * inputs
    stored = branch.numel() + (0 if projection is None else projection.numel())
    return BranchCost(stored, copies * (first + 2 * out * blocks))


def block_means(pruned: Tensor, block: int) -> Tensor:
    """B of the least-squares fit of `pruned` `[..., out, in]` by block-constant rows: the mean of each block."""
    *lead, out, inputs = pruned.shape
    return pruned.reshape(*lead, out, inputs // block, block).mean(-1)


def indicator(blocks: int, inputs: int, like: Tensor) -> Tensor:
    """P as a matrix `[r, in]`: row r is 1 on the inputs of block r."""
    return torch.eye(blocks, dtype=like.dtype, device=like.device).repeat_interleave(inputs // blocks, dim=-1)


def expand(branch: Tensor, inputs: int, projection: Tensor | None = None) -> Tensor:
    """B P: `[..., out, r]` -> `[..., out, in]`; P `[..., r, in]` is the indicator of blocks where none is given."""
    if projection is not None:
        return branch @ projection
    return branch.repeat_interleave(inputs // branch.shape[-1], dim=-1)
