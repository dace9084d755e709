"""Masks, criteria, the side branch, and what is reported of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseforge_core.errors import CurvatureUnavailable, PatternViolation, RecipeError
from sparseforge_core.sparsity import masking
from sparseforge_core.sparsity.criteria import HessianOBD, HessianRatio, Magnitude, WandaScore, standardize
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.sparsity.report import HISTOGRAM_EDGES, mask_histogram, mask_summary
from sparseforge_core.sparsity.slorb import BranchCost, SLoRB, block_means, cost, expand


def test_criteria_by_hand() -> None:
    w, h, norms = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([[10.0, 1.0]])
    assert Magnitude().score(w, None).tolist() == [[1.0, 2.0]]
    assert WandaScore().score(w, norms).tolist() == [[10.0, 2.0]]
    assert HessianOBD(relative_eps=0.5).score(w, h).tolist() == [[4.0, 8.0]]
    assert HessianRatio(relative_eps=0.5).score(w, h).tolist() == [[0.5, pytest.approx(2.0 / 2**0.5)]]
    with pytest.raises(CurvatureUnavailable, match="HessianOBD needs curvature"):
        HessianOBD().score(w, None)


@pytest.mark.parametrize("log", [True, False])
def test_standard_scores_keep_the_order_and_have_mean_zero_and_deviation_one(log: bool) -> None:
    scores = torch.rand(64, 64).double() ** 4
    z = standardize(scores, log=log)
    assert bool((z.flatten()[scores.flatten().argsort()].diff() >= 0).all())
    assert abs(float(z.mean())) < 1e-4
    assert float(z.std(correction=0)) == pytest.approx(1.0, abs=1e-3)


def test_constant_scores_standardise_to_zero_and_bad_ones_are_refused() -> None:
    assert torch.equal(standardize(torch.full((4, 4), 2.0), log=False), torch.zeros(4, 4))
    with pytest.raises(CurvatureUnavailable, match="not finite"):
        standardize(torch.tensor([[1.0, torch.nan]]), log=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_side_branch_equals_the_explicit_matrices_of_equation_1(transposed: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4, bias=False)
    weight = layer.weight.detach().clone()
    if transposed:
        layer.weight = nn.Parameter(weight.T.contiguous())
    soft = masking.attach(layer, "weight", transposed=transposed, slorb=SLoRB(k=4))
    original = masking.original(layer, "weight")
    soft.harden(original.detach().abs(), nm(2, 4))
    soft.set_view(0.0)
    soft.start_branch(original)
    assert soft.branch is not None
    projection = torch.zeros(2, 8)
    projection[0, :4] = projection[1, 4:] = 1.0
    hard = soft.matrix(soft.hard)
    pruned = weight * ~hard
    assert torch.allclose(soft.branch, pruned.reshape(4, 2, 4).mean(-1))
    expected = weight * hard + soft.branch @ projection
    assert torch.allclose(soft.matrix(layer.weight), expected)


@pytest.mark.parametrize("fit", ["mean", "sum"])
def test_a_trained_projection_starts_as_the_fixed_one(fit: str) -> None:
    torch.manual_seed(0)
    views = []
    for projection in ("fixed", "trained"):
        layer = nn.Linear(8, 4, bias=False)
        layer.weight.data = torch.arange(32.0).reshape(4, 8)
        slorb = SLoRB(k=4, projection=projection, fit=fit)  # type: ignore[arg-type]
        soft = masking.attach(layer, "weight", transposed=False, slorb=slorb)
        before = layer.weight.detach()
        assert torch.equal(before, masking.original(layer, "weight")), "no branch before the mask bites"
        soft.harden(before, nm(2, 4))
        soft.set_view(0.0)
        soft.start_branch(before)
        views.append(layer.weight)
    assert torch.equal(views[0], views[1])
    layer.weight.sum().backward()
    assert soft.projection is not None
    assert soft.projection.grad is not None


def test_branch_cost_by_hand() -> None:
    branch, projection = torch.zeros(6, 2), torch.zeros(2, 8)
    assert cost(branch, None, 8) == BranchCost(parameters=12, flops=8 + 2 * 6 * 2)
    assert cost(branch, projection, 8) == BranchCost(parameters=12 + 16, flops=2 * 2 * 8 + 2 * 6 * 2)
    assert cost(torch.zeros(3, 6, 2), None, 8) == BranchCost(parameters=36, flops=3 * 32)


@pytest.mark.parametrize("transposed", [False, True])
def test_rescaled_rows_keep_their_norm_through_the_quench_and_in_the_frozen_weight(transposed: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4, bias=False)
    if transposed:
        layer.weight = nn.Parameter(layer.weight.detach().T.contiguous())
    soft = masking.attach(layer, "weight", transposed=transposed)
    weight = masking.original(layer, "weight")
    norms = soft.matrix(weight.detach()).norm(dim=-1)
    soft.mask.mul_(torch.rand_like(soft.mask))
    soft.harden(weight.detach().abs(), nm(2, 4))
    for softness in (1.0, 0.4, 0.0):
        soft.set_view(softness, keep_norm_of=weight.detach())
        assert torch.allclose(soft.matrix(layer.weight.detach()).norm(dim=-1), norms)
    effective = layer.weight.detach().clone()
    soft.freeze(weight, nm(2, 4), "here", rows_rescaled=True)
    assert torch.allclose(layer.weight, effective)
    assert set(soft.view.unique().tolist()) == {0.0, 1.0}


def test_the_view_may_harden_by_threshold_and_then_fits_no_pattern() -> None:
    layer = nn.Linear(4, 1, bias=False)
    soft = masking.attach(layer, "weight", transposed=False)
    soft.mask.copy_(torch.tensor([[0.9, 0.8, 0.7, 0.1]]))
    soft.hard.copy_(torch.tensor([[True, True, False, False]]))
    soft.set_view(0.0, hard="threshold")
    assert soft.view.tolist() == [[1.0, 1.0, 1.0, 0.0]]
    soft.set_view(0.0)
    assert soft.view.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_branch_size_divides_what_k_does_not() -> None:
    assert SLoRB(k=64).block(96) == 48
    assert SLoRB(k=64).block(32) == 32
    assert expand(block_means(torch.arange(8.0).reshape(1, 8), 4), 8).tolist() == [[1.5] * 4 + [5.5] * 4]
    with pytest.raises(RecipeError, match="k=0"):
        SLoRB(k=0)


def test_freezing_a_mask_that_breaks_the_pattern_is_refused() -> None:
    layer = nn.Linear(8, 4, bias=False)
    soft = masking.attach(layer, "weight", transposed=False)
    with pytest.raises(PatternViolation, match="site here"):
        soft.freeze(masking.original(layer, "weight"), nm(2, 4), "here")


def test_summary_and_histogram_count_by_hand() -> None:
    mask, hard = torch.tensor([0.0, 0.5, 1.0, 0.95]), torch.tensor([False, True, True, True])
    summary = mask_summary([(mask, hard)])
    assert summary["mask/mid_fraction"] == 0.25
    assert summary["mask/soft_hard_gap"] == pytest.approx((0.5 + 0.05) / 4)
    counts = mask_histogram([mask])
    assert len(counts) == len(HISTOGRAM_EDGES) - 1
    assert counts[0] == 1
    assert counts[-1] == 2
    assert sum(counts) == 4
