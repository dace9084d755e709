"""The matrix products of a decode step, with what stands before and after each: norm, gate, residual.

A product is asked for the whole of y = residual + act(W norm(x)), so that one that can fuse the parts does; the base
class composes them of the small operations that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparseforge_core.errors import UnsupportedModel
from sparseforge_core.runtime.decode import plain
from sparseforge_core.runtime.linear import KernelLinear, SparseLinear

Norm = tuple[Tensor, float]
"""Weight and epsilon of an RMSNorm."""


class Product:
    """y = W x for x `[..., in]`, and what it costs to read."""

    nbytes: int
    """Of the weights, side branches and biases included: what one step of few rows reads."""

    def __init__(self, name: str, out: int, inputs: int, steps: ModuleType = plain) -> None:
        self.name, self.out, self.inputs, self.steps = name, out, inputs, steps

    @property
    def held_bytes(self) -> int:
        """All that is in memory: forms for large batches too."""
        return self.nbytes

    def unpacks(self, rows: int) -> bool:
        """Whether a product of so many rows unpacks a weight, and takes the memory of a dense one for it."""
        return False

    def times(self, rows: int) -> tuple[float, float] | None:
        """Seconds of the dense product and of this one for `rows` rows, where both were measured."""
        return None

    def apply(self, x: Tensor) -> Tensor:
        """W x and the bias."""
        raise NotImplementedError

    def __call__(
        self, x: Tensor, *, norm: Norm | None = None, gated: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """residual + act(W norm(x)); `gated` takes the first half of the rows as the gate of the second."""
        y = self.apply(x if norm is None else self.steps.norm(x, *norm))
        if gated:
            y = self.steps.gated(y)
        return y if residual is None else residual + y


Maker = Callable[[Sequence[Any], str], Product]
"""From the modules that read one input, and the name of the product, to the product."""


class Modules(Product):
    """The model's own modules, one after the other: the reference."""

    def __init__(self, modules: Sequence[Any], name: str, steps: ModuleType = plain) -> None:
        super().__init__(name, sum(m.out_features for m in modules), modules[0].in_features, steps)
        self._modules = list(modules)
        self.nbytes = sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))

    def unpacks(self, rows: int) -> bool:
        return any(isinstance(module, KernelLinear) and module.kernel.unpacks(rows) for module in self._modules)

    def apply(self, x: Tensor) -> Tensor:
        parts = [module(x) for module in self._modules]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class Dense(Product):
    """A dense weight `[out, in]` by whatever torch calls for it: cuBLAS on a GPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None, name: str, steps: ModuleType = plain) -> None:
        super().__init__(name, weight.shape[0], weight.shape[1], steps)
        self.weight, self.bias = weight, bias
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def apply(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def joined(modules: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """The rows of dense modules as one weight and one bias, the modules left with views of them."""
    for module in modules:
        if type(module) is not nn.Linear:
            raise UnsupportedModel(f"{type(module).__name__} is no dense Linear; load the export with dense=True")
    weight = join([module.weight.data for module in modules])
    for module, view in zip(modules, weight.split([m.out_features for m in modules]), strict=True):
        module.weight = nn.Parameter(view, requires_grad=False)
    return weight, joined_bias(modules)


def joined_bias(modules: Sequence[Any]) -> Tensor | None:
    """Biases side by side; zeros where only some modules have one."""
    if all(module.bias is None for module in modules):
        return None
    like = next(module.bias for module in modules if module.bias is not None)
    return join([like.new_zeros(m.out_features) if m.bias is None else m.bias.data for m in modules])


def join(rows: Sequence[Tensor]) -> Tensor:
    """Concatenated along the first axis; the tensor itself where there is one."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def reference(modules: Sequence[Any], name: str) -> Product:
    """The maker of the reference: any device, any pattern."""
    for module in modules:
        if not isinstance(module, (nn.Linear, SparseLinear, KernelLinear)):
            raise UnsupportedModel(f"{name}: {type(module).__name__} is no linear module that the static loop knows")
    return Modules(modules, name)
