"""SLoRB, the optional dense side branch of eq. (1): X (W~ + B P)^T with a fixed block projection P.

P sums each run of k consecutive inputs, so B P is B with every column repeated k times: it lives in weight
space, serves every kind of site, and costs `out * in / k` parameters. It stays apart at export, where adding
it in would fill the zeros.
"""

from __future__ import annotations

from torch import Tensor

from sparseforge_core.errors import RecipeError
from sparseforge_core.specs import spec


@spec("slorb")
class SLoRB:
    """A branch of one trained value for each output row and each block of `k` inputs."""

    k: int = 64
    """Inputs per block; must divide the input dimension of every site (a smaller divisor is used where not)."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RecipeError(f"k={self.k}: must be at least 1")

    def block(self, inputs: int) -> int:
        """The largest divisor of `inputs` that is at most k."""
        return next(size for size in range(min(self.k, inputs), 0, -1) if inputs % size == 0)


def block_means(pruned: Tensor, block: int) -> Tensor:
    """B of the least-squares fit of `pruned` `[..., out, in]` by block-constant rows: the mean of each block."""
    *lead, out, inputs = pruned.shape
    return pruned.reshape(*lead, out, inputs // block, block).mean(-1)


def expand(branch: Tensor, inputs: int) -> Tensor:
    """B P: `[..., out, in / k]` -> `[..., out, in]`."""
    return branch.repeat_interleave(inputs // branch.shape[-1], dim=-1)
