"""Products on the 2:4 kernels: weights that read one input joined, the residual added in the kernel where it can be."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_core.errors import UnsupportedModel
from sparseforge_core.runtime.decode.products import Dense, Maker, Modules, Norm, Product, join, joined, joined_bias
from sparseforge_core.runtime.kernels import KernelWeight, sparse_linear
from sparseforge_core.runtime.kernels.choices import against_dense
from sparseforge_core.runtime.kernels.tuning import LARGE_ROWS, tune
from sparseforge_core.runtime.kernels.weight import device_number
from sparseforge_core.runtime.linear import KernelLinear


class Sparse(Product):
    """A 2:4 weight by the kernels.

    For one row, what is to be added (bias, residual, the side branch of a fixed P) goes into the kernel as its bias.
    """

    def __init__(self, kernel: KernelWeight, bias: Tensor | None, name: str, steps: ModuleType) -> None:
        super().__init__(name, kernel.out_features, kernel.in_features, steps)
        self.kernel, self.bias = kernel, bias
        self.nbytes = self.held_bytes - sum(t.nbytes for t in (kernel.dense_copy, kernel.compressed) if t is not None)
        self._bare = kernel
        self._branch = kernel.branch if kernel.projection is None else None
        if self._branch is not None:  # the same memory without its branch, which is then added apart
            shape = kernel.out_features, kernel.in_features
            self._bare = KernelWeight(kernel.values, kernel.places, shape, kernel.backend)

    @property
    def held_bytes(self) -> int:
        return self.kernel.resident_bytes + (0 if self.bias is None else self.bias.nbytes)

    def unpacks(self, rows: int) -> bool:
        return self.kernel.unpacks(rows)

    def times(self, rows: int) -> tuple[float, float] | None:
        if self.kernel.backend != "mma":
            return None
        values, forms = self.kernel.values, self.kernel.forms
        return against_dense(self.out, self.inputs, rows, values.dtype, values.device.index, forms)

    def apply(self, x: Tensor) -> Tensor:
        if x.numel() != self.inputs:
            return sparse_linear(x, self.kernel, self.bias)
        return self._one_row(x, self.bias)

    def __call__(
        self, x: Tensor, *, norm: Norm | None = None, gated: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        if residual is None or x.numel() != self.inputs or self.bias is not None or gated:
            return super().__call__(x, norm=norm, gated=gated, residual=residual)
        return self._one_row(x if norm is None else self.steps.norm(x, *norm), residual)

    def _one_row(self, x: Tensor, added: Tensor | None) -> Tensor:
        added = None if added is None else added.reshape(-1)
        if self._branch is not None:
            added = self.steps.through_branch(x.reshape(-1), self._branch, added)
        return sparse_linear(x, self._bare, added)


def on_kernels(steps: ModuleType) -> Maker:
    """The maker of a model that `arm` prepared, with these small operations; what is dense in it stays dense."""

    def make(modules: Sequence[Any], name: str) -> Product:
        if all(type(module) is nn.Linear for module in modules):
            return Dense(*joined(modules), name, steps)
        if not all(isinstance(module, KernelLinear) for module in modules):
            kinds = ", ".join(sorted({type(module).__name__ for module in modules}))
            raise UnsupportedModel(f"{name}: a product joins 2:4 weights or dense ones, not {kinds}")
        kernels = [module.kernel for module in modules]
        if not joinable(kernels):
            return Modules(modules, name, steps)
        return Sparse(joined_kernels(kernels), joined_bias(modules), name, steps)

    return make


def joinable(kernels: Sequence[KernelWeight]) -> bool:
    """Whether the rows of several weights can be those of one: a trained projection belongs to its own weight alone."""
    blocks = {None if kernel.branch is None else kernel.branch.shape[1] for kernel in kernels}
    apart = any(kernel.projection is not None for kernel in kernels)
    return len(kernels) == 1 or (len(blocks) == 1 and not apart)


def joined_kernels(kernels: Sequence[KernelWeight]) -> KernelWeight:
    """The rows of several weights as one, these left with views of it: tiles of 16 outputs follow each other.

    In mode `throughput` the whole holds what its own shape needs, and of that the parts share a dense copy alone:
    cuSPARSELt's form has no rows.
    """
    first = kernels[0]
    if len(kernels) == 1:
        return first
    out, mode = sum(kernel.out_features for kernel in kernels), first.mode
    for kernel in kernels:
        kernel.hold("decode")
    values, places = join([kernel.values for kernel in kernels]), join([kernel.places for kernel in kernels])
    whole = KernelWeight(values, places, (out, first.in_features), first.backend)
    if first.branch is not None:
        whole.branch = join([kernel.branch for kernel in kernels if kernel.branch is not None])
    if mode == "throughput" and first.backend == "mma":
        tune([(out, first.in_features)], values.dtype, LARGE_ROWS, device=device_number(values.device), copies=True)
    whole.hold(mode)
    for name in ("values", "places", "branch"):
        _share(whole, kernels, name)
    if whole.dense_copy is not None:
        rows = whole.dense_copy.split([kernel.out_features for kernel in kernels])
        for kernel, view in zip(kernels, rows, strict=True):
            kernel.dense_copy = view
    if values.is_cuda:
        torch.cuda.synchronize(values.device)  # kernels fetch weights before what is queued in front of them has ended
    return whole


def _share(whole: KernelWeight, kernels: Sequence[KernelWeight], name: str) -> None:
    """Let the parts be views of the whole, so that nothing is held twice."""
    tensor = getattr(whole, name)
    if tensor is not None:
        for kernel, view in zip(kernels, tensor.split([getattr(k, name).shape[0] for k in kernels]), strict=True):
            setattr(kernel, name, view)
