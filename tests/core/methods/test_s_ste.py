"""S-STE's projection worked by hand, and its continuity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core.methods import SSTE
from sparseforge_core.methods.s_ste import soft_threshold
from sparseforge_core.sparsity.patterns import BLOCK_16, Unstructured, check_weight, nm
from tests.core.methods.one_layer import OneLayer


def test_a_group_worked_by_hand() -> None:
    """(4, -3, 2, -1): all move by 2, the third largest; beta = <w, S> / <S, S> = (8 + 3) / (4 + 1) = 2.2."""
    weight = torch.tensor([[4.0, -3.0, 2.0, -1.0]])
    assert soft_threshold(weight, nm(2, 4)).tolist() == [[2.0, -1.0, 0.0, 0.0]]
    layer = OneLayer(SSTE(), weight.tolist(), steps=10)
    assert torch.allclose(layer.model.weight, torch.tensor([[4.4, -2.2, 0.0, 0.0]]))
    w = layer.step([[0.0, 0.0, -1.0, 0.0]], rate=1.5)  # straight through: the pruned entry moves, and overtakes
    assert torch.allclose(w, torch.tensor([[4.0, -3.0, 3.5, -1.0]]))
    assert torch.allclose(layer.model.weight, torch.tensor([[2.2, 0.0, 1.1, 0.0]]))  # beta is that of the start
    layer.track.finish()
    assert torch.allclose(layer.model.weight, torch.tensor([[2.2, 0.0, 1.1, 0.0]]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 0.5))
def test_the_projection_is_continuous_with_constant_two(seed: int, size: float) -> None:
    """Every coordinate and the threshold move by at most the change: ||S(a) - S(b)||_max <= 2 ||a - b||_max."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(4, 8, generator=generator)
    b = a + size * (2 * torch.rand(4, 8, generator=generator) - 1)
    for pattern in (nm(2, 4), nm(3, 8)):
        moved = (soft_threshold(a, pattern) - soft_threshold(b, pattern)).abs().max()
        assert float(moved) <= 2 * float((a - b).abs().max()) + 1e-6


@pytest.mark.parametrize("pattern", [nm(2, 4), nm(1, 4), BLOCK_16, Unstructured(density=0.3)])
def test_the_projection_keeps_the_pattern_ties_included(pattern: object) -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    check_weight(soft_threshold(weight, pattern), pattern, "here")  # type: ignore[arg-type]
