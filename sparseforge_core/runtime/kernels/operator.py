"""The product with a 2:4 weight as one operator of torch, which compilers and CUDA graphs take as it is.

Where nobody looks at operators, what the operator does is called as it is: to find it costs the host a fifth more.
"""

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

    A side branch is added as its two factors: (x P^T) B^T, eq. (1). Raises ValueError for an x that wants a gradient,
    or that has another number of inputs, type or device than the weight.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x wants a gradient, and products with packed 2:4 weights compute none; run them under torch.no_grad(), or "
            "load the model with dense=True to train it"
        )
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x has {x.shape[-1]} inputs a row, the 2:4 weight {weight.in_features}")
    values, places, dense, compressed, branch = weight.held
    product = PRODUCT if _seen(x, bias) else _product
    out: Tensor = product(x, values, places, bias, dense, compressed, weight.out_features, weight.backend)
    if branch is not None:
        rows = x.reshape(-1, weight.in_features)
        out = out + through_branch(rows, branch, weight.projection).reshape(out.shape)
    return out


def _seen(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a product must be an operator: for a compiler, a trace, a mode, a transform, another kind of tensor.

    And for a bias that wants a gradient, as torch then warns of a backward pass that has none.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or (bias is not None and bias.requires_grad and torch.is_grad_enabled())
    )


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
    """`x [..., in]` -> `[..., out]`, accumulated in float32 on a GPU."""
    dtype, device = x.dtype, x.device
    if dtype is not values.dtype or device != values.device:
        raise ValueError(
            f"x is {dtype} on {device}, the 2:4 weight {values.dtype} on {values.device}; convert x, or load the "
            "model again with the type and device wanted"
        )
    *others, inputs = x.shape
    rows = x.numel() // inputs
    if backend == "reference" or rows == 0:
        weight = dense_of(values, places, (out, inputs)) if dense is None else dense
        return torch.nn.functional.linear(x.reshape(-1, inputs), weight, bias).view(*others, out)
    x = x.contiguous()
    if x.data_ptr() % ALIGNMENT:
        x = x.clone()
    if backend == "triton":
        from sparseforge_core.runtime.kernels import triton_products  # Triton is there on GPUs alone

        y = x.new_empty(*others, out)  # a list of sizes takes torch twice as long to read
        with torch.cuda.device(x.device):  # Triton launches on the current one
            triton_products.run(x.view(rows, inputs), values, places, bias, y.view(rows, out))
        return y
    forms = FORMS[dense is not None, compressed is not None]
    choice = choose(out, inputs, rows, dtype, device.index, forms)
    if choice.plan is not None:
        y = x.new_empty(*others, out)  # a list of sizes takes torch twice as long to read
        choice.plan.launch(x, values, places, bias, y, (rows, out, inputs))
        return y
    flat = x.view(rows, inputs)
    if choice.kind == "cusparselt" and compressed is not None:
        y = cusparselt.run(flat, compressed, bias, out, choice.algorithm)
    else:
        weight = dense if choice.kind == "dense" and dense is not None else expand(values, places, (out, inputs))
        y = torch.nn.functional.linear(flat, weight, bias)
    return y.view(*others, out)


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
    return x.new_empty(*x.shape[:-1], out)


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
