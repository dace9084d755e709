"""The two sides of benchmarks/decode.py: a model in random exact 2:4, and a dense one with the fastest dense product.

Weights are made on the device, packed from the start, so that a 7B model costs no conversion; nothing about the speed
of a product depends on their values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.decode_report import Machine
from sparseforge_core.runtime import load_sparse
from sparseforge_core.runtime.decode.on_kernels import Sparse, on_kernels
from sparseforge_core.runtime.decode.parts import Block, Parts, Sizes, parts_of
from sparseforge_core.runtime.decode.products import Dense, Norm, Product, joined, reference
from sparseforge_core.runtime.kernels import KernelWeight
from sparseforge_core.runtime.linear import PackedWeight
from sparseforge_core.runtime.manifest import WEIGHTS, read_manifest
from sparseforge_core.runtime.packed import Layout, Packed

MODELS = {
    "llama-2-7b": Sizes(32, 4096, 32, 32, 128, 11008, 32000, 16384, 1e-5),
    "tiny": Sizes(2, 64, 4, 4, 16, 128, 256, 512, 1e-5),
}
"""Shapes; the positions go beyond LLaMA-2's 4,096, so that a prompt of 8,192 can be timed."""

TWO_FOUR = Layout(2, 4, transposed=False)

PLACES = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)
"""The six pairs of places of a group, as the packed format writes them."""


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """`[out, in]` of the products of a layer, and of the head."""
    inner = sizes.heads * sizes.head
    return {
        "qkv": (sizes.qkv, sizes.width),
        "o": (sizes.width, inner),
        "gate_up": (2 * sizes.wide, sizes.width),
        "down": (sizes.width, sizes.wide),
        "head": (sizes.vocabulary, sizes.width),
    }


def random_packed(out: int, inputs: int, dtype: torch.dtype, device: torch.device, block: int | None) -> PackedWeight:
    """A random weight in exact 2:4, with a side branch of one value for each `block` inputs if that is given."""
    values = torch.randn(out, inputs // 2, device=device, dtype=dtype).mul_(0.02)
    codes = torch.tensor(PLACES, dtype=torch.uint8, device=device)
    low, high = (codes[torch.randint(0, 6, (out, inputs // 8), device=device)] for _ in range(2))
    branch = None
    if block is not None:
        branch = (torch.randn(out, inputs // block, device=device, dtype=dtype).mul_(0.002), None)
    return PackedWeight(Packed(values, low | high << 4), TWO_FOUR, (out, inputs), branch)


Choose = Callable[[str, int, int], Product]
"""From a product's name and shape to one with random weights."""


def sparse_side(device: torch.device, dtype: torch.dtype, steps: ModuleType, *, block: int | None, mode: Any) -> Choose:
    """Products in random 2:4; the head is dense, as it is in every recipe."""

    def make(name: str, out: int, inputs: int) -> Product:
        if name == "head":
            return dense_head(out, inputs, device, dtype, steps)
        packed = random_packed(out, inputs, dtype, device, block)
        return Sparse(KernelWeight.of(packed, mode=mode), None, name, steps)

    return make


def dense_side(device: torch.device, dtype: torch.dtype, steps: ModuleType) -> Choose:
    """Dense products with random weights."""

    def make(name: str, out: int, inputs: int) -> Product:
        if name == "head":
            return dense_head(out, inputs, device, dtype, steps)
        return Swappable(torch.randn(out, inputs, device=device, dtype=dtype).mul_(0.02), None, name, steps)

    return make


def dense_head(out: int, inputs: int, device: torch.device, dtype: torch.dtype, steps: ModuleType) -> Product:
    """The head, the same on both sides."""
    return Swappable(torch.randn(out, inputs, device=device, dtype=dtype).mul_(0.02), None, "head", steps)


def random_parts(sizes: Sizes, make: Choose, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Parts:
    """A model of these sizes with the products that `make` makes."""
    torch.manual_seed(seed)
    shapes = shapes_of(sizes)
    ones = functools.partial(torch.ones, sizes.width, device=device, dtype=dtype)
    blocks = []
    for _ in range(sizes.layers):
        qkv, out, gate_up, down = (make(name, *shapes[name]) for name in ("qkv", "o", "gate_up", "down"))
        blocks.append(Block(ones(), qkv, out, ones(), gate_up, down))
    embedding = torch.randn(sizes.vocabulary, sizes.width, device=device, dtype=dtype)
    return Parts(sizes, embedding, blocks, ones(), make("head", *shapes["head"]), *rotations(sizes, device))


def rotations(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of LLaMA-2's rotary positions."""
    frequencies = 10000.0 ** -(torch.arange(0, sizes.head, 2, device=device, dtype=torch.float32) / sizes.head)
    angles = torch.arange(sizes.positions, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


class Swappable(Dense):
    """A dense product whose way of multiplying one row is chosen by measurement; `way` says which it is."""

    way: tuple[Any, ...] = ("cublas",)

    def __call__(
        self, x: Tensor, *, norm: Norm | None = None, gated: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        if self.way[0] != "triton" or x.numel() != self.inputs or gated:
            return super().__call__(x, norm=norm, gated=gated, residual=residual)
        x = x if norm is None else self.steps.norm(x, *norm)
        return self._triton(x, residual)

    def apply(self, x: Tensor) -> Tensor:
        if x.numel() == self.inputs and self.way[0] == "triton":
            return self._triton(x, None)
        if x.numel() == self.inputs and self.way[0] == "compiled":
            return compiled()(x, self.weight)  # type: ignore[no-any-return]
        return functional.linear(x, self.weight)

    def _triton(self, x: Tensor, residual: Tensor | None) -> Tensor:
        from benchmarks.dense_rows import one_row

        return one_row(x.reshape(-1), self.weight, residual, *self.way[1:]).reshape(*x.shape[:-1], self.out)


@functools.cache
def compiled() -> Any:
    """torch.compile's own choice for a product, tuned for each shape."""
    return torch.compile(functional.linear, mode="max-autotune-no-cudagraphs", dynamic=False)


TRITON_WAYS = (
    *(("triton", *config, True) for config in ((1, 1024, 4), (2, 1024, 4), (4, 512, 4), (4, 1024, 8), (1, 4096, 8))),
    *(("triton", *config, False) for config in ((4, 512, 4), (4, 1024, 8))),
)
"""Outputs per program, inputs at a time, warps, whether it starts early."""


def use_fastest(products: Sequence[Swappable], time: Callable[[], float], *, compile_too: bool) -> dict[str, float]:
    """Let products of one shape multiply one row in the way that `time` measures as fastest; seconds by way."""
    found: dict[str, float] = {}
    ways = (("cublas",), *TRITON_WAYS, *((("compiled",),) if compile_too else ()))
    best: tuple[float, tuple[Any, ...]] | None = None
    for way in ways:
        for product in products:
            product.way = way
        found["-".join(map(str, way))] = taken = time()
        if best is None or taken < best[0]:
            best = taken, way
    assert best is not None
    for product in products:
        product.way = best[1]
    return found


class Sides:
    """Makes the models that are compared, one at a time."""

    def __init__(self, model: str, machine: Machine, dtype: torch.dtype) -> None:
        self.machine, self.dtype = machine, dtype
        self.folder = None if model in MODELS else Path(model)
        self.sizes = None if self.folder else MODELS[model]
        if self.folder is not None:
            read_manifest(self.folder, skip=(WEIGHTS,))

    def parts(self, side: str, *, block: int | None = None, mode: str = "decode") -> Parts:
        """One side, on the device."""
        device, steps = self.machine.device, self.machine.steps
        if self.folder is not None:
            return self._real(side, mode)
        assert self.sizes is not None
        if side == "dense":
            return random_parts(self.sizes, dense_side(device, self.dtype, steps), device, self.dtype)
        return random_parts(
            self.sizes, sparse_side(device, self.dtype, steps, block=block, mode=mode), device, self.dtype
        )

    def shapes(self) -> list[tuple[int, int]]:
        """Of the products in 2:4, where they are known before a model is made."""
        return [] if self.sizes is None else [s for name, s in shapes_of(self.sizes).items() if name != "head"]

    def _real(self, side: str, mode: Any) -> Parts:
        """Of a packed export, its dense side unpacked once."""
        assert self.folder is not None
        mode = mode if self.machine.cuda else "decode"
        model = load_sparse(self.folder, dense=side == "dense", device=str(self.machine.device), mode=mode)
        if side == "dense":
            return parts_of(model, lambda modules, name: Swappable(*joined(modules), name, self.machine.steps))
        return parts_of(model, on_kernels(self.machine.steps) if self.machine.cuda else reference)
