"""Muon for the masked weights: what its update is, that both rules share one state, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods import AST, DenseControl, FrozenMask, SparseForge
from sparseforge_core.methods.base import Surroundings
from sparseforge_core.models.sites import assign_patterns
from sparseforge_core.recipe import TrainPlan
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.train.muon import MOMENTUM, RMS, MuonAdam, orthogonal
from sparseforge_core.train.optimizer import build_optimizer, set_rate
from tests.tiny import sites_of, tiny_model, tokens

PLAN = TrainPlan(steps=20, sequences=2, length=8, rule="muon")


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 16)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    found = torch.linalg.svdvals(orthogonal(x))
    # Newton-Schulz with these coefficients leaves singular values between 0.68 and 1.13 (Jordan et al.).
    assert found.min() > 0.5
    assert found.max() < 1.3
    inside = u.transpose(-1, -2) @ orthogonal(x) @ v.transpose(-1, -2)
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-4


def test_one_step_is_the_equation() -> None:
    weight, other = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))
    rule = MuonAdam([{"params": [other], "weight_decay": 0.0}], [weight], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    set_rate(rule, 0.01)
    before = weight.detach().clone()
    weight.grad, other.grad = torch.randn(6, 4), torch.randn(4)
    first = weight.grad.clone()
    rule.step()
    wanted = before * (1 - 0.01 * 0.1) - 0.01 * RMS * 6**0.5 * orthogonal(first * (1 + MOMENTUM))
    torch.testing.assert_close(weight.detach(), wanted)
    assert set(rule.state[weight]) == {"momentum"}
    assert "exp_avg" in rule.state[other]


def _around(method: Any) -> tuple[Any, Any, Surroundings]:
    model = tiny_model("llama")
    sites = assign_patterns(sites_of(model), nm(2, 4)) if method.sparsifies else []
    around = Surroundings(
        model=model, sites=sites, slorb=None, steps=20, calibration=lambda n, length: [tokens(n, 8, seed=0)]
    )
    return model, sites, around


@pytest.mark.parametrize("method", [SparseForge(), FrozenMask()])
def test_only_masked_weights_follow_it(method: Any) -> None:
    model, sites, around = _around(method)
    rule = build_optimizer(model, sites, PLAN, method.start(around))
    assert isinstance(rule, MuonAdam)
    assert {id(p) for p in rule.param_groups[-1]["params"]} == {id(site.weight) for site in sites}
    every = [id(p) for group in rule.param_groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", [AST(), DenseControl()])
def test_a_rule_that_cannot_be_followed_is_refused(method: Any) -> None:
    model, sites, around = _around(method)
    with pytest.raises(RecipeError, match=r"train\.rule=.muon."):
        build_optimizer(model, sites, PLAN, method.start(around))
    build_optimizer(model, sites, replace(PLAN, rule="adamw"), method.start(_around(method)[2]))
