"""The mask update against the equations, worked by hand and in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core.sparsity.gate import (
    AnnealPoint,
    GateForm,
    blend,
    hard_target,
    layer_threshold,
    project,
    push_apart,
    quench_view,
    soft_gate,
    threshold,
    update_mask,
)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


Z = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


def test_threshold_is_the_nth_score_or_midway_to_the_next() -> None:
    assert threshold(Z, 2, "nth").flatten().tolist() == [0.5, 0.3]
    assert threshold(Z, 2, "midpoint").flatten().tolist() == pytest.approx([0.25, 0.25])


def test_midpoint_puts_exactly_the_survivors_above_one_half() -> None:
    gate = soft_gate(Z, 2, 0.1, "midpoint")
    assert torch.equal(gate > 0.5, hard_target(Z, 2))
    assert (soft_gate(Z, 2, 0.1, "nth") > 0.5).sum(-1).tolist() == [1, 1]


@given(seed=st.integers(0, 9999), keep=st.integers(1, 7), temperature=st.floats(0.05, 2))
@settings(max_examples=30, deadline=None)
def test_exact_sum_gates_add_up_to_the_number_kept(seed: int, keep: int, temperature: float) -> None:
    torch.manual_seed(seed)
    z = torch.randn(16, 8, dtype=torch.float64)
    sums = soft_gate(z, keep, temperature, "exact-sum").sum(-1)
    assert torch.allclose(sums, torch.full_like(sums, keep), atol=1e-6)


def test_a_layer_wide_threshold_is_one_for_all_groups_of_a_matrix() -> None:
    z = torch.tensor([[5.0, 4.0, 3.0, 2.0], [1.0, 0.0, -1.0, -2.0]])
    assert layer_threshold(z, 2, "midpoint").tolist() == [[1.5]]
    gate = soft_gate(z, 2, 0.1, "midpoint", "layer")
    assert (gate > 0.5).sum(-1).tolist() == [4, 0], "groups no longer keep two each: what the paper's gate prevents"
    experts = torch.stack([z, -z])
    assert layer_threshold(experts, 2, "midpoint").shape == (2, 1, 1)


def test_the_published_code_pulls_towards_the_top_of_the_gate_and_ties_of_it_go_to_the_lower_place() -> None:
    z = torch.tensor([[9.0, 9.5, 0.0, 0.1]])
    at = AnnealPoint(temperature=0.01, structure_mix=0.0, mid_push=0.5, mask_rate=1.0)
    mask = torch.full((1, 4), 0.5)
    target = torch.tensor([[False, True, True, False]])  # a frozen target that the scores no longer agree with
    to_scores = update_mask(mask, z, target, 2, at, GateForm())
    to_gate = update_mask(mask, z, target, 2, at, GateForm(push_target="gate"))
    assert to_scores.tolist() == [[0.75, 1.0, 0.25, 0.0]]
    assert to_gate.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_update_mask_equals_the_equations_by_hand() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.5, 0.25]], dtype=torch.float64)
    at = AnnealPoint(temperature=0.5, structure_mix=0.4, mid_push=0.2, mask_rate=0.1)
    new = update_mask(mask, Z[:1], hard_target(Z[:1], 2), 2, at, GateForm())
    expected = []
    for z, m, target in zip(Z[0].tolist(), mask[0].tolist(), [1.0, 0.0, 1.0, 0.0], strict=True):
        gate = sigmoid((z - 0.25) / 0.5)  # eq. (3), tau = (0.5 + 0.0) / 2
        gate = (1 - 0.4) * gate + 0.4 * target  # section 4.3
        gate = min(1.0, max(0.0, gate - 0.2 * (m - target)))  # eq. (4)
        expected.append((1 - 0.1) * m + 0.1 * gate)  # eq. (5)
    assert new[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_the_literal_line_11_without_the_blend_is_another_update() -> None:
    gate, target = soft_gate(Z, 2, 1.0, "midpoint"), hard_target(Z, 2).double()
    assert not torch.allclose(
        push_apart(blend(gate, target, 0.5), gate, target, 0.1), push_apart(gate, gate, target, 0.1)
    )


@given(beta=st.floats(0, 1), kappa=st.floats(0, 0.9), temperature=st.floats(0.05, 2), seed=st.integers(0, 9999))
@settings(max_examples=30, deadline=None)
def test_iterating_reaches_the_fixed_point_of_the_equations(
    beta: float, kappa: float, temperature: float, seed: int
) -> None:
    torch.manual_seed(seed)
    z = torch.randn(16, 4, dtype=torch.float64)
    target = hard_target(z, 2)
    at = AnnealPoint(temperature=temperature, structure_mix=beta, mid_push=kappa, mask_rate=0.5)
    mask = torch.ones_like(z)
    for _ in range(200):
        mask = update_mask(mask, z, target, 2, at, GateForm())
    gate = soft_gate(z, 2, temperature, "midpoint")
    fixed = ((1 - beta) * gate + (beta + kappa) * target) / (1 + kappa)
    assert torch.allclose(mask, fixed, atol=1e-6)


@given(seed=st.integers(0, 9999))
@settings(max_examples=30, deadline=None)
def test_masks_stay_between_zero_and_one(seed: int) -> None:
    torch.manual_seed(seed)
    mask = torch.rand(8, 4)
    at = AnnealPoint(temperature=0.05, structure_mix=0.3, mid_push=1.0, mask_rate=0.7)
    for _ in range(20):
        z = torch.randn(8, 4)
        mask = update_mask(mask, z, hard_target(z, 2), 2, at, GateForm())
        assert float(mask.min()) >= 0.0
        assert float(mask.max()) <= 1.0


def test_hysteresis_keeps_the_incumbent_until_it_is_beaten_by_the_margin() -> None:
    z = torch.tensor([[1.0, 0.5, 0.6, 0.0]])
    incumbent = torch.tensor([[True, True, False, False]])
    assert hard_target(z, 2, incumbent, margin=0.2).tolist() == [[True, True, False, False]]
    assert hard_target(z, 2, incumbent, margin=0.05).tolist() == [[True, False, True, False]]


def test_projection_breaks_ties_of_the_mask_by_the_scores() -> None:
    z = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert project(torch.ones(1, 4), z, 2).tolist() == [[False, True, False, True]]
    assert project(torch.tensor([[0.9, 0.1, 0.8, 0.2]]), z, 2).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("size", [4, 64])
def test_equal_masks_are_ranked_by_scores_and_then_by_place(size: int) -> None:
    mask = torch.zeros(1, size)
    mask[0, :3] = torch.tensor([0.5, 0.5 + 1e-7, 0.5])
    z = torch.zeros(1, size)
    z[0, 2] = 1.0
    assert project(mask, z, 1).nonzero().tolist() == [[0, 1]], "a difference in m wins, however small"
    assert project(mask, z, 2)[0, :3].tolist() == [False, True, True]
    assert project(torch.zeros(1, size), torch.zeros(1, size), 2).nonzero().tolist() == [[0, 0], [0, 1]]


def test_quench_slides_from_the_soft_mask_to_the_hard_one() -> None:
    mask, hard = torch.tensor([0.8, 0.4]), torch.tensor([True, False])
    assert quench_view(mask, hard, 1.0).tolist() == pytest.approx([0.8, 0.4])
    assert quench_view(mask, hard, 0.25).tolist() == pytest.approx([0.95, 0.1])
    assert quench_view(mask, hard, 0.0).tolist() == [1.0, 0.0]
