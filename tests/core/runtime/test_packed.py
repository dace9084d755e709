"""The packed layout: every bit comes back, whatever the pattern, type, orientation, ties and zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core.errors import ExportError, PatternViolation
from sparseforge_core.runtime import reference_reader
from sparseforge_core.runtime.packed import (
    BITS,
    Layout,
    Packed,
    check_indices,
    layout_of,
    pack,
    read_places,
    same_bits,
    unpack,
    write_places,
)
from sparseforge_core.sparsity.patterns import BLOCK_16, Unstructured, nm, top_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def pruned(draw: st.DrawFn) -> tuple[torch.Tensor, Layout]:
    """A weight that fits its N:M pattern, with ties and with zeros of both signs among what is kept."""
    group = draw(st.sampled_from((2, 3, 4, 5, 8, 16, 32)))
    keep = draw(st.integers(1, group - 1))
    lead = draw(st.sampled_from(((), (1,), (3,))))
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    shape = (*lead, rows, groups * group)
    coarse = torch.randint(-2, 3, shape, generator=generator).float()  # ties and zeros
    matrix = torch.where(torch.rand(shape, generator=generator) < 0.5, coarse, torch.randn(shape, generator=generator))
    mask = top_mask(torch.rand(shape, generator=generator), nm(keep, group))
    matrix = torch.where(matrix == 0, matrix * torch.randn(shape, generator=generator).sign(), matrix)
    matrix = torch.where(mask, matrix, 0.0).to(draw(st.sampled_from(DTYPES)))
    transposed = draw(st.booleans())
    weight = matrix.transpose(-1, -2).contiguous() if transposed else matrix
    return weight, layout_of(nm(keep, group), transposed=transposed, where="w")


def as_numpy(x: torch.Tensor) -> np.ndarray[Any, Any]:
    return x.view(torch.uint16).numpy() if x.dtype is torch.bfloat16 else x.numpy()


@settings(max_examples=200, deadline=None)
@given(pruned())
def test_every_bit_comes_back(case: tuple[torch.Tensor, Layout]) -> None:
    weight, layout = case
    packed = pack(weight, layout, "w")
    assert packed.signs_dropped == 0
    assert (packed.values.shape, packed.indices.shape) == layout.packed_shapes(tuple(weight.shape))
    check_indices(packed.indices, layout, tuple(weight.shape), "w")
    back = unpack(packed.values, packed.indices, layout, tuple(weight.shape))
    assert same_bits(back, weight)
    again = pack(back, layout, "w")
    assert same_bits(again.values, packed.values)
    assert torch.equal(again.indices, packed.indices)
    entry = {
        "keep": layout.keep,
        "group": layout.group,
        "index_bits": layout.index_bits,
        "transposed": layout.transposed,
    }
    reference = reference_reader.unpack(as_numpy(packed.values), packed.indices.numpy(), entry)
    assert reference.tobytes() == weight.reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 2**20))
def test_index_streams_of_every_width(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, 2**bits, (3, count), generator=generator).to(torch.uint8)
    written = write_places(places, bits)
    assert written.shape == (3, -(-count * bits // 8))
    assert torch.equal(read_places(written, bits, count), places)
    stream = sum(int(place) << (bits * i) for i, place in enumerate(places[0]))
    assert bytes(written[0].tolist()) == stream.to_bytes(written.shape[1], "little")


def test_two_of_four_is_a_nibble_a_group_lowest_first() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, 7.0, 1.0, 2.0, 0.0, 0.0]])
    packed = pack(weight, Layout(2, 4, transposed=False), "w")
    assert packed.values.tolist() == [[5.0, 7.0, 1.0, 2.0]]
    assert packed.indices.tolist() == [[(1 | 3 << 2) | (0 | 1 << 2) << 4]]


def test_a_group_with_fewer_non_zeros_has_valid_places() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.0, -0.0, 4.0]])
    layout = Layout(2, 4, transposed=False)
    packed = pack(weight, layout, "w")
    assert read_places(packed.indices, 2, 6).tolist() == [[0, 3, 0, 1, 1, 3]]
    assert packed.signs_dropped == 1, "the second negative zero of the last group has no place and becomes +0"
    back = unpack(packed.values, packed.indices, layout, (1, 12))
    assert torch.equal(back, weight)
    assert bool(torch.signbit(back[0, 9]))
    assert not bool(torch.signbit(back[0, 10]))


def test_nan_payloads_and_infinities_are_bits_like_others() -> None:
    bits = torch.tensor([[0x7FC1, 0, 0, -0x80, 0, 0x7F80, 1, 0]], dtype=torch.int16)
    weight = bits.view(torch.bfloat16)
    layout = Layout(2, 4, transposed=False)
    packed = pack(weight, layout, "w")
    assert torch.equal(unpack(packed.values, packed.indices, layout, (1, 8)).view(BITS[weight.dtype]), bits)


def test_a_large_weight_is_packed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = top_mask(torch.rand(37, 24, generator=torch.Generator().manual_seed(0)), nm(4, 8))
    weight, layout = torch.where(mask, 1.5, 0.0), Layout(4, 8, transposed=False)
    whole = pack(weight, layout, "w")
    monkeypatch.setattr("sparseforge_core.runtime.packed.PIECE", 100)
    pieces = pack(weight, layout, "w")
    assert torch.equal(pieces.indices, whole.indices)
    assert torch.equal(unpack(pieces.values, pieces.indices, layout, (37, 24)), weight)


def test_a_weight_that_is_not_sparse_is_refused_with_site_and_group() -> None:
    weight = torch.zeros(6, 16)
    weight[4, 8:11] = 1.0
    with pytest.raises(PatternViolation, match=r"site a\.b is not 2:4: group 2 of row 4 \(inputs 8 to 11\) holds 3"):
        pack(weight, Layout(2, 4, transposed=False), "a.b")
    with pytest.raises(PatternViolation, match="group 2 of row 4"):
        pack(weight.T.contiguous(), Layout(2, 4, transposed=True), "a.b")


def test_what_has_no_packed_layout_says_what_to_use() -> None:
    for pattern in (BLOCK_16, Unstructured(density=0.5)):
        with pytest.raises(PatternViolation, match=r"site w: .* use --format hf"):
            layout_of(pattern, transposed=False, where="w")
    with pytest.raises(ExportError, match="float64 cannot be packed"):
        pack(torch.zeros(2, 4, dtype=torch.float64), Layout(2, 4, transposed=False), "w")
    with pytest.raises(PatternViolation, match="6 inputs do not divide"):
        pack(torch.zeros(2, 6), Layout(2, 4, transposed=False), "w")


@pytest.mark.parametrize(
    ("layout", "shape", "spoil"),
    [
        (Layout(2, 4, transposed=False), (2, 8), lambda p: p.indices.zero_()),  # the same place twice
        (Layout(2, 4, transposed=False), (2, 8), lambda p: p.indices.fill_(0b1110_0001)),  # descending
        (Layout(1, 3, transposed=False), (2, 12), lambda p: p.indices.fill_(0xFF)),  # place 3 of 3
        (Layout(2, 4, transposed=False), (2, 4), lambda p: p.indices.bitwise_or_(0xF0)),  # unused bits
    ],
)
def test_damaged_places_are_found(layout: Layout, shape: tuple[int, int], spoil: Any) -> None:
    packed: Packed = pack(torch.zeros(shape), layout, "w")
    spoil(packed)
    with pytest.raises(PatternViolation, match="site w"):
        check_indices(packed.indices, layout, shape, "w")
    entry = {"keep": layout.keep, "group": layout.group, "index_bits": layout.index_bits, "transposed": False}
    with pytest.raises(ExportError, match="w: "):
        reference_reader.unpack(packed.values.numpy(), packed.indices.numpy(), entry, "w")
