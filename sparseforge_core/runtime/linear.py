"""Linear modules that hold packed weights: the reference path, which unpacks in each forward, and the kernels' one.

The reference's arithmetic is that of the module replaced, on the same bits, so that outputs are equal bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_core.errors import ExportError
from sparseforge_core.runtime.kernels import KernelWeight, sparse_linear
from sparseforge_core.runtime.packed import Layout, Packed, unpack
from sparseforge_core.sparsity.slorb import expand


class PackedWeight(nn.Module):
    """One packed weight, and the factors of its side branch, if it has one."""

    values: Tensor
    indices: Tensor
    branch: Tensor | None
    projection: Tensor | None

    def __init__(
        self,
        packed: Packed,
        layout: Layout,
        shape: tuple[int, ...],
        branch: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.shape = layout, shape
        self.register_buffer("values", packed.values)
        self.register_buffer("indices", packed.indices)
        self.register_buffer("branch", None if branch is None else branch[0])
        self.register_buffer("projection", None if branch is None else branch[1])

    def dense(self) -> Tensor:
        """The effective weight in its stored layout: eq. (1)'s W~ + B P."""
        weight = unpack(self.values, self.indices, self.layout, self.shape)
        return weight if self.branch is None else add_branch(weight, self.layout, (self.branch, self.projection))

    @property
    def resident_bytes(self) -> int:
        """What it holds in memory."""
        return sum(buffer.nbytes for buffer in self.buffers())


def add_branch(weight: Tensor, layout: Layout, branch: tuple[Tensor, Tensor | None]) -> Tensor:
    """`weight` in its stored layout with B P added in place, as `opening.open_finished` does."""
    matrix = weight.transpose(-1, -2) if layout.transposed else weight
    matrix += expand(branch[0], matrix.shape[-1], branch[1])
    return weight


class SparseLinear(nn.Module):
    """In the place of an `nn.Linear`, or of a `Conv1D` where the layout is transposed."""

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias
        self.out_features, self.in_features = packed.layout.matrix_shape(packed.shape)
        self.nx, self.nf = self.in_features, self.out_features  # as Conv1D calls them

    @property
    def weight(self) -> Tensor:
        """The effective weight, for modules that look at it."""
        return self.packed.dense()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.packed.dense()
        if not self.packed.layout.transposed:
            return nn.functional.linear(x, weight, self.bias)
        assert self.bias is not None  # Conv1D always has one
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.packed.layout.name} packed"

    def _save_to_state_dict(self, *_: Any) -> None:
        raise ExportError(NO_STATE)


NO_STATE = (
    "a model that holds packed weights has no state dict of a plain model; load it with dense=True to save it, or use "
    "`sparseforge export`"
)


class KernelLinear(nn.Module):
    """In the place of an `nn.Linear`: a 2:4 weight arranged for the kernels of its device."""

    def __init__(self, kernel: KernelWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.kernel = kernel
        self.bias = bias
        self.out_features, self.in_features = kernel.out_features, kernel.in_features

    @property
    def weight(self) -> Tensor:
        """The effective weight, for modules that look at it."""
        weight = self.kernel.dense()
        if self.kernel.branch is None:
            return weight
        return add_branch(weight, Layout(2, 4, transposed=False), (self.kernel.branch, self.kernel.projection))

    def forward(self, x: Tensor) -> Tensor:
        kernel: Any = self._modules["kernel"]  # to look it up as an attribute costs as much as two launches
        return sparse_linear(x, kernel, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, 2:4 on kernels"

    def _save_to_state_dict(self, *_: Any) -> None:
        raise ExportError(NO_STATE)
