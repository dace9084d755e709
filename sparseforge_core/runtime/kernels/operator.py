"""The product with a 2:4 weight as one operator of torch, which compilers and CUDA graphs take as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseforge_core.runtime.kernels.weight import KernelWeight, dense_of


def sparse_linear(x: Tensor, weight: KernelWeight, bias: Tensor | None = None) -> Tensor:
    """`x [..., in]` times the transposed weight, plus `bias [out]`: `[..., out]` in the type of x.

    A side branch is added as its two factors: (x P^T) B^T, eq. (1).
    """
    rows = x.reshape(-1, weight.in_features)
    out = product(rows, weight.values, weight.places, bias, weight.large, weight.out_features, weight.backend)
    if weight.branch is not None:
        out = out + through_branch(rows, weight.branch, weight.projection)
    return out.reshape(*x.shape[:-1], weight.out_features)


def through_branch(rows: Tensor, branch: Tensor, projection: Tensor | None) -> Tensor:
    """`(rows P^T) B^T`; a fixed P sums each block of inputs."""
    if projection is None:
        sums = rows.reshape(rows.shape[0], branch.shape[-1], -1).sum(-1)
    else:
        sums = rows @ projection.transpose(-1, -2)
    return sums @ branch.transpose(-1, -2)


@torch.library.custom_op("sparseforge::linear_24", mutates_args=())
def product(
    x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, large: Tensor | None, out: int, backend: str
) -> Tensor:
    """`x [rows, in]` -> `[rows, out]`, accumulated in float32 on a GPU."""
    return torch.nn.functional.linear(x, dense_of(values, places, (out, x.shape[1])), bias)


@product.register_fake
def _(
    x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, large: Tensor | None, out: int, backend: str
) -> Tensor:
    return x.new_empty(x.shape[0], out)
