"""The fused column sweep gives what `second_order.sweep` gives; its kernel runs interpreted, in its own process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseforge_core.sparsity import fused, fused_sweep
from sparseforge_core.sparsity.patterns import BLOCK_16, Pattern, Unstructured, nm
from sparseforge_core.sparsity.second_order import inverse_factor, sweep
from tests.interpreted import assert_agreement


def test_what_the_kernel_does_not_cover_is_said() -> None:
    weight = torch.zeros(16, 2048)
    assert "is on cpu" in str(fused_sweep.refusal(weight, nm(2, 4), 128))
    assert "1024 columns" in str(fused_sweep.refusal(weight, nm(2, 4), 1024, on="cpu"))
    assert "1024 columns" in str(fused_sweep.refusal(weight, nm(2, 1024), 128, on="cpu"))
    last = None if fused.available() else "Triton is not installed"  # said of what the kernel would cover
    for pattern in (nm(2, 4), nm(1, 3), BLOCK_16, Unstructured()):
        assert fused_sweep.refusal(weight, pattern, 128, on="cpu") == last


@pytest.mark.parametrize("pattern", [nm(2, 4), BLOCK_16, Unstructured(scope="matrix")])
def test_what_is_refused_is_swept_one_by_one_to_the_bit(pattern: Pattern) -> None:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(100, 32, generator=made)
    factor = inverse_factor(x.T @ x, 0.01, "here")
    weights = [torch.randn(rows, 32, generator=made) for rows in (16, 48)]
    for weight, (new, keep) in zip(weights, fused_sweep.sweep_together(weights, factor, pattern, 128), strict=True):
        expected, kept = sweep(weight, factor, pattern, 128)
        assert torch.equal(new, expected)
        assert torch.equal(keep, kept)


@pytest.mark.skipif(not fused.available(), reason="Triton is not installed: there is nothing to compare")
@pytest.mark.slow
def test_the_kernel_agrees_with_plain_torch() -> None:
    assert_agreement(Path(__file__).with_name("sweep_cases.py"))
