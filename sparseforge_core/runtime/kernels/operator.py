"""The product with a 2:4 weight as one operator of torch, which compilers and CUDA graphs take as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseforge_core.runtime.kernels import cusparselt
from sparseforge_core.runtime.kernels.choices import FORMS, choose
from sparseforge_core.runtime.kernels.expanding import expand
from sparseforge_core.runtime.kernels.weight import KernelWeight, dense_of

ALIGNMENT = 16
"""Bytes that loads of x are aligned to."""


def sparse_linear(x: Tensor, weight: KernelWeight, bias: Tensor | None = None) -> Tensor:
    """`x [..., in]` times the transposed weight, plus `bias [out]`: `[..., out]` in the type of x.

    A side branch is added as its two factors: (x P^T) B^T, eq. (1). Raises ValueError for an x that wants a gradient.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x wants a gradient, and products with packed 2:4 weights compute none; run them under torch.no_grad(), or "
            "load the model with dense=True to train it"
        )
    rows = x.reshape(-1, weight.in_features)
    copies = (weight.dense_copy, weight.compressed)
    out: Tensor = PRODUCT(rows, weight.values, weight.places, bias, *copies, weight.out_features, weight.backend)
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


def _product(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    bias: Tensor | None,
    dense: Tensor | None,
    compressed: Tensor | None,
    out: int,
    backend: str,
) -> Tensor:
    """`x [rows, in]` -> `[rows, out]`, accumulated in float32 on a GPU."""
    rows, inputs = x.shape
    if x.dtype != values.dtype or x.device != values.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}, the 2:4 weight {values.dtype} on {values.device}; convert x, or load the "
            "model again with the type and device wanted"
        )
    if backend == "reference" or rows == 0:
        return torch.nn.functional.linear(x, dense_of(values, places, (out, inputs)) if dense is None else dense, bias)
    x = x.contiguous()
    if x.data_ptr() % ALIGNMENT:
        x = x.clone()
    if backend == "triton":
        from sparseforge_core.runtime.kernels import triton_products  # Triton is there on GPUs alone

        y = x.new_empty(rows, out)
        with torch.cuda.device(x.device):  # Triton launches on the current one
            triton_products.run(x, values, places, bias, y)
        return y
    return _fastest(x, values, places, bias, dense, compressed, out)


def _fastest(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    bias: Tensor | None,
    dense: Tensor | None,
    compressed: Tensor | None,
    out: int,
) -> Tensor:
    rows, inputs = x.shape
    forms = FORMS[dense is not None, compressed is not None]
    choice = choose(out, inputs, rows, x.dtype, x.device.index, forms)
    if choice.plan is not None:
        y = x.new_empty(rows, out)
        choice.plan.run(x, values, places, bias, y)
        return y
    if choice.kind == "cusparselt" and compressed is not None:
        return cusparselt.run(x, compressed, bias, out, choice.algorithm)
    weight = dense if choice.kind == "dense" and dense is not None else expand(values, places, (out, inputs))
    return torch.nn.functional.linear(x, weight, bias)


def _shape_of_product(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    bias: Tensor | None,
    dense: Tensor | None,
    compressed: Tensor | None,
    out: int,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape[0], out)


NAME = "sparseforge::linear_24"
SCHEMA = (
    "(Tensor x, Tensor values, Tensor places, Tensor? bias, Tensor? dense, Tensor? compressed, SymInt out, "
    "str backend) -> Tensor"
)

torch.library.define(NAME, SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.impl(NAME, "CompositeExplicitAutograd", _product)
torch.library.register_fake(NAME, _shape_of_product)

PRODUCT = torch.ops.sparseforge.linear_24.default
"""The operator. `torch.library.custom_op` would put three times the host's time in front of it, for gradients."""
