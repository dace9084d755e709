"""One packed 2:4 weight, arranged for the products of its device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from sparseforge_core.errors import ExportError, unknown
from sparseforge_core.runtime.kernels import cusparselt
from sparseforge_core.runtime.kernels.expanding import expand
from sparseforge_core.runtime.kernels.fragments import from_fragments, to_fragments
from sparseforge_core.runtime.kernels.support import supported
from sparseforge_core.runtime.packed import Layout, unpack

if TYPE_CHECKING:
    from sparseforge_core.runtime.linear import PackedWeight

Backend = Literal["reference", "mma", "triton"]
"""Who multiplies: torch on an unpacked weight, our sparse tensor-core kernels, or the plainer Triton ones."""

BACKENDS: tuple[Backend, ...] = ("reference", "mma", "triton")

Mode = Literal["decode", "throughput"]
"""Whether nothing but the packed weight stays in memory, or a second form for large batches too."""

MODES: tuple[Mode, ...] = ("decode", "throughput")

TWO_FOUR = Layout(2, 4, transposed=False)


class KernelWeight(nn.Module):
    """A 2:4 weight `[out, in]` on its device, with the factors of its side branch, if it has one.

    In mode `decode` it holds the kept values and their places alone, 0.5625 of a dense weight of two-byte values;
    batches too large for the kernels unpack it into memory that is given back at once. In mode `throughput` it also
    holds a dense copy and, on a GPU, one in the form of cuSPARSELt, so that every batch takes the fastest way: 2.125
    of a dense weight, which `resident_bytes` counts.
    """

    values: Tensor
    places: Tensor
    branch: Tensor | None
    projection: Tensor | None
    dense_copy: Tensor | None
    compressed: Tensor | None

    def __init__(self, values: Tensor, places: Tensor, shape: tuple[int, int], backend: Backend) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.backend: Backend = backend
        self.register_buffer("values", values)
        self.register_buffer("places", places)
        self.register_buffer("branch", None)
        self.register_buffer("projection", None)
        self.register_buffer("dense_copy", None)
        self.register_buffer("compressed", None)

    @classmethod
    def of(
        cls,
        packed: PackedWeight,
        *,
        device: torch.device | str | None = None,
        backend: Backend | None = None,
        mode: Mode = "decode",
    ) -> KernelWeight:
        """Arrange a packed weight for a device, its own by default.

        Args:
            packed: the weight; it is left as it is, so that its memory is free once the caller lets it go.
            device: where the products are taken.
            backend: `reference` on the CPU and `mma` on a GPU by default; nothing falls back by itself.
            mode: what large batches may hold in memory.

        Raises ExportError, saying why, if the weight cannot be multiplied there.
        """
        device = torch.device(device) if device is not None else packed.values.device
        backend = backend or ("reference" if device.type == "cpu" else "mma")
        if backend not in BACKENDS:
            raise ExportError(unknown("backend", backend, BACKENDS))
        if backend != "reference" and device.type == "cpu":
            raise ExportError(f"backend={backend!r}: runs on a GPU, not on the CPU; use backend 'reference'")
        if mode not in MODES:
            raise ExportError(unknown("mode", mode, MODES))
        shape = packed.layout.matrix_shape(packed.shape)
        if (packed.layout.keep, packed.layout.group) != (2, 4):
            raise ExportError(f"the kernels multiply 2:4 weights, not {packed.layout.name}; load it with dense=True")
        why = supported(device, packed.values.dtype, shape)
        if why is not None:
            raise ExportError(why)
        values, places = packed.values.to(device), packed.indices.to(device)
        if backend == "mma":
            values, places = to_fragments(values, places)
        weight = cls(values, places, (shape[0], shape[1]), backend)
        if packed.branch is not None:
            weight.branch = packed.branch.to(device)
            weight.projection = None if packed.projection is None else packed.projection.to(device)
        if mode == "throughput":
            weight.dense_copy = weight.dense()
            if device.type == "cuda":
                weight.compressed = cusparselt.compress(weight.dense_copy)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels fetch weights before what was launched in front of them has ended
        return weight

    def dense(self) -> Tensor:
        """The weight `[out, in]` unpacked, bit for bit, without its side branch."""
        return dense_of(self.values, self.places, (self.out_features, self.in_features))

    @property
    def resident_bytes(self) -> int:
        """All that it holds in memory."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, 2:4, {self.backend}"


def dense_of(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """`[out, in]` of either arrangement: as packed, or in fragments."""
    if values.ndim > 2 and values.is_cuda:
        return expand(values, places, shape)
    if values.ndim > 2:
        values, places = from_fragments(values, places, shape[1])
    return unpack(values, places, TWO_FOUR, shape)
