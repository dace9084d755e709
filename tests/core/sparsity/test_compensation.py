"""Compensation against the normal equations of each row, solved one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core.errors import CurvatureUnavailable
from sparseforge_core.sparsity.compensation import compensate
from sparseforge_core.sparsity.patterns import nm, top_mask


def layer(seed: int, out: int = 6, inputs: int = 16, tokens: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights `[out, in]`, correlated inputs `[tokens, in]`) in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(out, inputs, generator=generator, dtype=torch.float64), x


def error(w: torch.Tensor, target: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return ((w - target) @ x.T).square().sum(-1)


@given(seed=st.integers(0, 9999))
@settings(max_examples=20, deadline=None)
def test_rows_solve_their_normal_equations(seed: int) -> None:
    target, x = layer(seed)
    hard = top_mask(target.abs(), nm(2, 4))
    gram, damping = x.T @ x, 0.01
    found = compensate(target, hard, gram, damping=damping, limit=1000)
    damped = gram + damping * gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    for row in range(len(target)):
        kept = hard[row]
        exact = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ target[row])
        assert torch.allclose(found[row][kept], exact, rtol=1e-3, atol=1e-4)
        assert not bool(found[row][~kept].any())


@given(seed=st.integers(0, 9999), limit=st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_every_number_of_iterations_is_at_least_as_good_as_zeroing(seed: int, limit: int) -> None:
    target, x = layer(seed)
    hard = top_mask(target.abs(), nm(2, 4))
    gram = x.T @ x
    ridge = 1e-6
    zeroed, found = target * hard, compensate(target, hard, gram, damping=ridge, limit=limit)
    assert bool((error(found, target, x) <= error(zeroed, target, x) * (1 + 1e-3)).all())


def test_a_stack_of_experts_is_solved_expert_by_expert_and_float32_stays_float32() -> None:
    layers = [layer(seed) for seed in (1, 2)]
    target, gram = (torch.stack(parts).float() for parts in ([w for w, _ in layers], [x.T @ x for _, x in layers]))
    hard = top_mask(target.abs(), nm(2, 4))
    both = compensate(target, hard, gram)
    assert both.dtype == torch.float32
    for i in range(2):
        assert torch.allclose(both[i], compensate(target[i], hard[i], gram[i]), rtol=1e-3, atol=1e-4)


def test_inputs_that_were_never_seen_leave_their_weights_alone() -> None:
    target, x = layer(3)
    x[:, :4] = 0.0
    hard = top_mask(target.abs(), nm(2, 4))
    found = compensate(target, hard, x.T @ x)
    assert torch.allclose(found[:, :4], (target * hard)[:, :4])
    for bad in (torch.zeros(16, 16), torch.full((16, 16), torch.nan)):
        with pytest.raises(CurvatureUnavailable, match="not finite, or all zero"):
            compensate(target, hard, bad)
