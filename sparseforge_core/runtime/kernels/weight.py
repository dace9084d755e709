"""One packed 2:4 weight, arranged for the products of its device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sparseforge_core.errors import ExportError, unknown
from sparseforge_core.runtime.kernels import cusparselt
from sparseforge_core.runtime.kernels.choices import FORMS, NONE, Forms, choose, forms_for
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
"""Whether nothing but the packed weight stays in memory, or what large batches need too."""

MODES: tuple[Mode, ...] = ("decode", "throughput")

TWO_FOUR = Layout(2, 4, transposed=False)


class KernelWeight(nn.Module):
    """A 2:4 weight `[out, in]` on its device, with the factors of its side branch, if it has one.

    In mode `decode` it holds the kept values and their places alone, 0.5625 of a dense weight of two-byte values, which
    the kernels multiply by whatever the number of rows. In mode `throughput` it also holds what makes large batches of
    its shape faster still, by the measurements of `choices.forms_for`: the form of cuSPARSELt (0.5625 more), a dense
    copy (1 more), both or neither. `resident_bytes` counts everything.
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
        self.mode: Mode = "decode"
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
        weight.hold(mode)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels fetch weights before what was launched in front of them has ended
        return weight

    def hold(self, mode: Mode) -> None:
        """Make the forms that a mode needs here, and let go of those that it does not."""
        forms = forms_of(self.out_features, self.in_features, self.values.dtype, self.values.device, self.backend, mode)
        self.mode, self.dense_copy, self.compressed = mode, None, None
        dense = self.dense() if forms else None
        if dense is not None and "cusparselt" in forms:
            self.compressed = cusparselt.compress(dense)
        if "dense" in forms:
            self.dense_copy = dense

    def dense(self) -> Tensor:
        """The weight `[out, in]` unpacked, bit for bit, without its side branch."""
        return dense_of(self.values, self.places, (self.out_features, self.in_features))

    def unpacks(self, rows: int) -> bool:
        """Whether a product of so many rows unpacks it into memory that is given back after."""
        if self.backend != "mma":
            return False
        device = self.values.device.index
        return choose(self.out_features, self.in_features, rows, self.values.dtype, device, self.forms).kind == "expand"

    @property
    def held(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What a product reads: values, places, dense copy, compressed form, branch.

        By torch's own look-up of a module's buffers each would cost the host as much as a launch.
        """
        held: dict[str, Any] = self._buffers
        return held["values"], held["places"], held["dense_copy"], held["compressed"], held["branch"]

    @property
    def forms(self) -> Forms:
        """What it holds beside the packed weight."""
        return FORMS[self.dense_copy is not None, self.compressed is not None]

    @property
    def resident_bytes(self) -> int:
        """All that it holds in memory."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, 2:4, {self.backend}"


def forms_of(
    out: int, inputs: int, dtype: torch.dtype, device: torch.device | None, backend: Backend, mode: Mode
) -> Forms:
    """What a weight holds beside its packed form; without a device, on a GPU of the committed measurements.

    The reference path multiplies by a dense copy in mode `throughput`; the Triton kernels take every batch themselves.
    """
    if mode == "decode" or backend == "triton":
        return NONE
    if backend == "reference":
        return frozenset({"dense"})
    return forms_for(out, inputs, dtype, None if device is None else device_number(device))


def device_number(device: torch.device) -> int:
    """Of a CUDA device, the current one if it says none."""
    return torch.cuda.current_device() if device.index is None else device.index


def dense_of(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """`[out, in]` of either arrangement: as packed, or in fragments."""
    if values.ndim > 2 and values.is_cuda:
        return expand(values, places, shape)
    if values.ndim > 2:
        values, places = from_fragments(values, places, shape[1])
    return unpack(values, places, TWO_FOUR, shape)
