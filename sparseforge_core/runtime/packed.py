"""The packed layout of one N:M weight: kept values, and their places in `ceil(log2 M)` bits each.

A weight `[..., out, in]` becomes values `[..., out, in/M N]` and index bytes `[..., out, ceil(in/M N b / 8)]`. The kept
places of a group ascend, so every group can be checked when it is read; an index stream starts at each row and fills
bytes from their lowest bit. docs/packed-format.md is the description for readers in other languages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseforge_core.errors import ExportError, PatternViolation
from sparseforge_core.sparsity.patterns import GroupPattern, Pattern, keep_top

VALUE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Safetensors name -> type of kept values; others are refused."""

BITS = {
    torch.float64: torch.int64,  # never in a file; a loaded model may be asked to compute in it
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""The integer type that shows a value's bits."""

PIECE = 1 << 18
"""Entries packed or unpacked at once: they fit a cache, and what is held beside a weight does not grow with it."""

LARGEST_GROUP = 256
"""An index is at most one byte."""


@dataclass(frozen=True)
class Layout:
    """N:M along the input axis of a weight, stored `[..., in, out]` where `transposed`."""

    keep: int
    group: int
    transposed: bool

    @property
    def index_bits(self) -> int:
        """b = ceil(log2 M)."""
        return (self.group - 1).bit_length()

    @property
    def name(self) -> str:
        """As people say it: 2:4."""
        return f"{self.keep}:{self.group}"

    def matrix_shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """`[..., out, in]` of a weight of this stored shape."""
        return (*stored[:-2], stored[-1], stored[-2]) if self.transposed else tuple(stored)

    def packed_shapes(self, stored: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the values and of the index bytes."""
        *lead, inputs = self.matrix_shape(stored)
        kept = inputs // self.group * self.keep
        return (*lead, kept), (*lead, -(-kept * self.index_bits // 8))


@dataclass(frozen=True)
class Packed:
    """One packed weight."""

    values: Tensor
    indices: Tensor
    signs_dropped: int = 0
    """Negative zeros in pruned places, which unpack as +0."""


def layout_of(pattern: Pattern, *, transposed: bool, where: str) -> Layout:
    """How weights of a pattern are packed. Raises PatternViolation, naming the site and what to do, if they are not."""
    if not isinstance(pattern, GroupPattern) or pattern.rows != 1 or pattern.cols > LARGEST_GROUP:
        raise PatternViolation(
            f"site {where}: the packed format holds N:M groups along the input (2:4, 4:8, M up to {LARGEST_GROUP}), "
            f"not {pattern.name}; use --format hf, which keeps any pattern as exact zeros"
        )
    return Layout(pattern.keep, pattern.cols, transposed)


def pack(weight: Tensor, layout: Layout, where: str) -> Packed:
    """Pack a weight in its stored layout, and check that what was packed unpacks to the same bits.

    Every group keeps exactly N places: the non-zeros, then zeros, negative ones first. Raises PatternViolation naming
    the first group that holds more, or ExportError for a type that is not packed.
    """
    if weight.dtype not in VALUE_DTYPES.values():
        raise ExportError(f"site {where}: values of {weight.dtype} cannot be packed; use float32, bfloat16 or float16")
    matrix = weight.transpose(-1, -2) if layout.transposed else weight
    inputs = matrix.shape[-1]
    if inputs % layout.group:
        raise PatternViolation(f"site {where}: {inputs} inputs do not divide into groups of {layout.group}")
    rows = matrix.reshape(-1, inputs)
    values_shape, indices_shape = layout.packed_shapes(tuple(weight.shape))
    values = weight.new_empty(rows.shape[0], values_shape[-1])
    indices = torch.empty(rows.shape[0], indices_shape[-1], dtype=torch.uint8, device=weight.device)
    dropped = 0
    for first in range(0, rows.shape[0], _step(inputs)):
        part = slice(first, first + _step(inputs))
        dropped += _pack_rows(rows[part].contiguous(), layout, where, first, values[part], indices[part])
    return Packed(values.reshape(values_shape), indices.reshape(indices_shape), dropped)


def unpack(values: Tensor, indices: Tensor, layout: Layout, stored: tuple[int, ...]) -> Tensor:
    """The weight in its stored shape, bit for bit, pruned places +0. Indices must have passed `check_indices`."""
    shape = layout.matrix_shape(stored)
    inputs = shape[-1]
    flat, packed = values.reshape(-1, values.shape[-1]), indices.reshape(-1, indices.shape[-1])
    out = values.new_zeros(flat.shape[0], inputs)
    for first in range(0, flat.shape[0], _step(inputs)):
        part = slice(first, first + _step(inputs))
        out[part] = _unpack_rows(flat[part], packed[part], layout, inputs)
    matrix = out.reshape(shape)
    return matrix.transpose(-1, -2).contiguous() if layout.transposed else matrix


def check_indices(indices: Tensor, layout: Layout, stored: tuple[int, ...], where: str) -> None:
    """Raise PatternViolation unless the places of every group ascend below M and unused bits are zero."""
    *_, inputs = layout.matrix_shape(stored)
    flat = indices.reshape(-1, indices.shape[-1])
    for first in range(0, flat.shape[0], _step(inputs)):
        part = flat[first : first + _step(inputs)]
        kept = inputs // layout.group * layout.keep
        places = read_places(part, layout.index_bits, kept)
        grouped = places.reshape(part.shape[0], -1, layout.keep)
        wrong = grouped[..., -1] >= layout.group
        if layout.keep > 1:
            wrong |= (grouped[..., 1:] <= grouped[..., :-1]).any(-1)
        if bool(wrong.any()):
            row, group = (int(i) for i in wrong.nonzero()[0])
            raise PatternViolation(
                f"site {where}: group {group} of row {first + row} says places {grouped[row, group].tolist()}, which "
                f"are not {layout.keep} ascending ones below {layout.group}; the file is damaged, export it anew"
            )
        if not torch.equal(write_places(places, layout.index_bits), part):
            raise PatternViolation(f"site {where}: unused index bits are set; the file is damaged, export it anew")


def write_places(places: Tensor, bits: int) -> Tensor:
    """Places `[rows, n]` uint8 -> bytes `[rows, ceil(n bits / 8)]`, each filled from its lowest bit."""
    rows, count = places.shape
    if 8 % bits == 0:
        padded = torch.nn.functional.pad(places, (0, -count % (8 // bits))).reshape(rows, -1, 8 // bits)
        shifts = range(0, 8, bits)
    else:
        stream = (places.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8, device=places.device)) & 1
        padded = torch.nn.functional.pad(stream.reshape(rows, -1), (0, -count * bits % 8)).reshape(rows, -1, 8)
        shifts = range(8)
    written = padded[..., 0].clone()
    for place, shift in enumerate(shifts):
        written |= padded[..., place] << shift
    return written


def read_places(indices: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `write_places`: bytes `[rows, bytes]` -> places `[rows, count]` uint8."""
    rows, width = indices.shape[0], bits if 8 % bits == 0 else 1
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=indices.device)
    pieces = (indices.unsqueeze(-1) >> shifts) & ((1 << width) - 1)
    if width == bits:
        return pieces.reshape(rows, -1)[:, :count]
    stream = pieces.reshape(rows, -1)[:, : count * bits].reshape(rows, count, bits)
    places = stream[..., 0].clone()
    for bit in range(1, bits):
        places |= stream[..., bit] << bit
    return places


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one type agree in every bit, signs of zeros and NaN payloads included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def _step(inputs: int) -> int:
    return max(1, PIECE // inputs)


def _pack_rows(rows: Tensor, layout: Layout, where: str, first: int, values: Tensor, indices: Tensor) -> int:
    """Fill `values` and `indices` of some rows; returns how many negative zeros were dropped."""
    grouped = rows.reshape(rows.shape[0], -1, layout.group)
    holds = grouped != 0
    count = holds.sum(-1, dtype=torch.int16)
    if bool((count > layout.keep).any()):
        row, group = (int(i) for i in (count > layout.keep).nonzero()[0])
        raise PatternViolation(
            f"site {where} is not {layout.name}: group {group} of row {first + row} (inputs {group * layout.group} to "
            f"{(group + 1) * layout.group - 1}) holds {int(count[row, group])} non-zeros; prune the model first, or "
            "use --format hf"
        )
    marked = grouped.view(BITS[rows.dtype]) != 0
    kept = keep_top(holds.to(torch.int8) + marked.to(torch.int8), layout.keep)
    places = torch.arange(layout.group, dtype=torch.uint8, device=rows.device).expand_as(grouped)
    values.copy_(grouped.masked_select(kept).reshape(values.shape))
    indices.copy_(write_places(places.masked_select(kept).reshape(values.shape), layout.index_bits))
    dropped = marked & ~kept
    back = _unpack_rows(values, indices, layout, rows.shape[1])
    if not same_bits(back.reshape(grouped.shape), grouped.masked_fill(dropped, 0.0)):
        raise ExportError(f"site {where}: rows from {first} do not unpack to what was packed; nothing was written")
    return int(dropped.sum())


def _unpack_rows(values: Tensor, indices: Tensor, layout: Layout, inputs: int) -> Tensor:
    places = read_places(indices, layout.index_bits, values.shape[-1])
    bits = values.view(BITS[values.dtype])  # scattering bfloat16 itself would change NaN payloads
    grouped = bits.new_zeros(values.shape[0], inputs // layout.group, layout.group)
    shape = (*grouped.shape[:-1], layout.keep)
    grouped.scatter_(-1, places.reshape(shape).long(), bits.reshape(shape))
    return grouped.reshape(-1, inputs).view(values.dtype)
