"""How one product is run: which kernel, built with which sizes, and on how many blocks of threads."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from sparseforge_core.runtime.kernels.nvrtc import SHARED_MEMORY, Kernel, load
from sparseforge_core.runtime.kernels.support import COLUMNS, ROWS
from sparseforge_core.runtime.kernels.tensor_map import COLUMNS as STAGE_INPUTS
from sparseforge_core.runtime.kernels.tensor_map import tensor_map

BLOCK_BYTES = 4096 + 512
"""Values and places of 16 outputs x 256 inputs."""

STAGE_ROW = 512 + 16
"""Bytes of one row of x in a stage of `tiles`, padded against bank conflicts."""

WIDE_ROW = STAGE_INPUTS * 2
"""Bytes of one row of x in a stage of `wide`, and of 64 outputs of y on their way out."""

WIDE_WEIGHTS = BLOCK_BYTES // 4
"""Bytes of 16 outputs x 64 inputs: a stage of the weights of one warp in `wide`."""

PAIRED, IN_FOURS = 2, 120 / 132
"""Blocks of a cluster up to which clusters fill a chip, and the part of it that clusters of four fill: they do not
cross its groups of 16 or 18 multiprocessors."""

MAPS = (2, 3)
"""Arguments of `wide` that are the tensor maps of x and y."""

WARPGROUP = 4
"""Warps that issue an instruction of 64 outputs together."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one kernel; which ones matter depends on the kernel (see the heads of the files in cuda/)."""

    kernel: Literal["gemv", "stream", "tiles", "wide"]
    rows: int
    """Most rows of x in one pass or tile: 1, or a multiple of 8."""
    warps: int
    """Warps that multiply; in `tiles` and `wide` each takes `tiles / warps` tiles."""
    depth: int
    """Blocks (`gemv`), slots (`stream`) or stages (`tiles`, `wide`) of loads under way."""
    tiles: int = 1
    """Tiles of 16 outputs per block of threads (`gemv`, `tiles`, `wide`)."""
    split: int = 1
    """Blocks of threads that share the inputs (`tiles`, `wide`)."""
    resident: int = 1
    """Blocks of threads per multiprocessor that registers must suffice for."""
    share: int = 1
    """Blocks of threads that share x, each with other outputs (`wide`)."""

    def shared(self, inputs: int) -> int:
        """Bytes of dynamic shared memory of one block of threads."""
        blocks = -(-inputs // COLUMNS)
        if self.kernel == "gemv":
            return 0
        if self.kernel == "stream":
            x = blocks * 512 * self.rows
            return self.depth * (BLOCK_BYTES + 16) + x + 2 * self.warps * 64 * self.rows
        parts = self.rows * (self.tiles * ROWS + 4) * 4
        if self.kernel == "wide":
            rings = self.depth * self.rows * WIDE_ROW + self.weights * self.tiles * WIDE_WEIGHTS
            out = self.warps // WARPGROUP * 2 * self.chunk * WIDE_ROW
            return 1024 + (rings + out if self.split == 1 else max(rings, parts)) + 16 * self.depth
        stages = self.depth * (self.rows * STAGE_ROW + self.tiles * BLOCK_BYTES)
        return max(stages, parts)

    def fits(self, inputs: int) -> bool:
        """Whether a multiprocessor has room for it."""
        return self.depth > 0 and self.resident * (self.shared(inputs) + 1024) <= SHARED_MEMORY + 1024

    def constants(self, out: int, inputs: int, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
        """Compile-time sizes for a weight `[out, in]`."""
        found = {
            "OUT": out,
            "COLUMNS": inputs,
            "BLOCKS": -(-inputs // COLUMNS),
            "BF16": int(dtype == torch.bfloat16),
            "ROWS": self.rows,
            "MIN_CTAS": self.resident,
        }
        if self.kernel == "gemv":
            found |= {"WARPS": self.warps, "DEPTH": self.depth, "GROUP": self.tiles}
        elif self.kernel == "stream":
            found |= {"WARPS": self.warps, "SLOTS": self.depth}
        elif self.kernel == "wide":
            found |= {"GROUPS": self.warps // WARPGROUP, "MT": self.tiles // self.warps, "STAGES": self.depth}
            found |= {"SHARE": self.share, "SPLIT": self.split, "HELPERS": self.helpers, "WEIGHTS": self.weights}
        else:
            found |= {"TM": self.tiles, "MT": self.tiles // self.warps, "STAGES": self.depth, "SPLIT": self.split}
        return tuple(found.items())

    @property
    def weights(self) -> int:
        """Stages of weights under way for each warp of `wide`: more where they may come from memory, not the cache."""
        return 8 if self.resident == 1 and self.rows * self.tiles <= 1024 else 4

    @functools.cached_property
    def chunk(self) -> int:
        """Rows of y that a warpgroup of `wide` sends at a time."""
        return next(rows for rows in (64, 48, 32) if self.rows % rows == 0)

    @property
    def helpers(self) -> int:
        """Threads that copy. In `wide` one does; it brings three that wait where the others need its registers."""
        if self.kernel == "wide":
            crowded = self.warps > WARPGROUP and self.resident == 1 and self.tiles // self.warps * self.rows > 128
            return 128 if crowded else 32
        return {"gemv": 0, "stream": 32, "tiles": 128}[self.kernel]

    def threads(self) -> int:
        """Threads of one block."""
        return 32 * self.warps * (self.tiles if self.kernel == "gemv" else 1) + self.helpers

    def grid(self, out: int, rows: int, processors: int) -> tuple[int, int]:
        """Blocks of threads for `rows` rows of x."""
        count = out // ROWS
        if self.kernel == "gemv":
            return -(-count // self.tiles), 1
        if self.kernel == "stream":
            return min(count, processors * self.resident), 1
        if self.kernel == "wide":
            clusters = -(-count // (self.tiles * self.share)) * -(-rows // self.rows)
            if self.split == 1:  # tiles beyond those that fit at once are taken in turn
                clusters = min(clusters, self.reached(processors) * self.resident // self.share)
            return clusters * self.share * self.split, 1
        return -(-count // self.tiles) * self.split * -(-rows // self.rows), 1

    def reached(self, processors: int) -> int:
        """Of so many multiprocessors those that its clusters fill."""
        return processors if self.share * self.split <= PAIRED else int(processors * IN_FOURS)

    def __hash__(self) -> int:
        return self._hash  # a product looks its plan up, and eight fields take longer than the rest of that

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.rows, self.warps, self.depth, self.tiles, self.split, self.resident, self.share))

    def build(self, out: int, inputs: int, dtype: torch.dtype, device: int) -> Kernel:
        """The loaded kernel; built when first asked for."""
        sizes = self.constants(out, inputs, dtype)
        by_value = MAPS if self.kernel == "wide" else ()
        return load(self.kernel, sizes, self.threads(), self.shared(inputs), device, by_value)

    def run(self, x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Fill `out [..., out]` with `x [..., in]` times the weight's transpose, plus the bias; both are contiguous."""
        outputs = out.shape[-1]
        self.launch(x, values, places, bias, out, (out.numel() // outputs, outputs, x.shape[-1]))

    def launch(
        self,
        x: Tensor,
        values: Tensor,
        places: Tensor,
        bias: Tensor | None,
        out: Tensor,
        sizes: tuple[int, int, int],
    ) -> None:
        """`run` for one who knows rows, outputs and inputs, as to ask tensors for them costs the host as much again."""
        rows, outputs, inputs = sizes
        dtype, at = x.dtype, out.data_ptr()
        kernel, grid = _prepared(self, outputs, inputs, rows, dtype, x.device.index)
        added = 0 if bias is None else bias.data_ptr()
        if self.kernel == "wide":
            x_map = tensor_map(x.data_ptr(), rows, inputs, self.rows // self.share, dtype)
            y_map = tensor_map(at, rows, outputs, self.chunk, dtype)
            kernel(grid, values.data_ptr(), places.data_ptr(), x_map.address, y_map.address, added, at, rows)
        else:
            kernel(grid, values.data_ptr(), places.data_ptr(), x.data_ptr(), added, at, rows)

    def describe(self) -> dict[str, int | str]:
        """As it stands in a table of measurements."""
        return asdict(self)


@functools.lru_cache(maxsize=8192)
def _prepared(
    plan: Plan, out: int, inputs: int, rows: int, dtype: torch.dtype, device: int
) -> tuple[Kernel, tuple[int, int]]:
    """The kernel of a plan, and its blocks of threads for so many rows: what every launch asks for."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return plan.build(out, inputs, dtype, device), plan.grid(out, rows, processors)
