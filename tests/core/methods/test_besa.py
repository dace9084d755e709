"""BESA's mixture worked by hand, and an allocation that spares the layer that matters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods import BESA
from sparseforge_core.methods.besa import LearnedRate
from sparseforge_core.models.sites import Site
from sparseforge_core.sparsity.patterns import Unstructured, check_mask, nm
from tests.core.methods.test_sparsegpt import around_of
from tests.tiny import tiny_model


def test_the_mixture_worked_by_hand() -> None:
    """Four candidates 1/4 .. 1 with beta = (1, 2, 1, 0) / 4: alpha = 1/2; scores (4, 3, 2, 1) rank r = 3/4 .. 0.

    The least entry is pruned by all candidates, P = 1; the next by those above 1/4, P = 3/4; then P = 1/4 and 0. Those
    with P >= 1/2 go.
    """
    layer = nn.Linear(4, 1, bias=False)
    site = Site("weight", layer, "weight", False, "mlp", chosen=nm(2, 4))
    law = LearnedRate(site, torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 4)
    with torch.no_grad():
        law.theta.copy_(torch.tensor([1.0, 2.0, 1.0, 1e-20]).log())
    assert float(law.alpha().detach()) == pytest.approx(0.5)
    assert torch.allclose(law.mask(), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    # Straight through: d sum(c * mask) / d theta is that of sum(c * (1 - P)).
    c = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    (found,) = torch.autograd.grad((c * law.mask()).sum(), law.theta)
    theta = law.theta.detach().clone().requires_grad_()
    beta = torch.softmax(theta, 0)
    p = torch.stack([beta[3], beta[2] + beta[3], beta[1] + beta[2] + beta[3], beta.sum()])
    (wanted,) = torch.autograd.grad((c[0] * (1 - p)).sum(), theta)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_it_starts_from_the_recipes_rate() -> None:
    layer = nn.Linear(64, 8, bias=False)
    for density in (0.3, 0.5, 0.7):
        site = Site("weight", layer, "weight", False, "mlp", chosen=Unstructured(density=density))
        law = LearnedRate(site, layer.weight.detach().abs(), 100)
        assert float(law.alpha().detach()) == pytest.approx(1 - density, abs=0.01)
        assert float(law.mask().detach().mean()) == pytest.approx(density, abs=0.06)


@pytest.mark.parametrize("scores", ["wanda", "magnitude"])
@pytest.mark.parametrize("pattern", [nm(4, 8), Unstructured(density=0.5)])
def test_every_block_meets_the_density_and_spares_the_layers_that_matter(pattern: object, scores: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(20.0)  # the MLP's output dominates the block's; attention hardly shows
    method = BESA(scores=scores, samples=12, epochs=12, rate=0.1)  # type: ignore[arg-type]
    track = method.start(around_of(model, pattern))
    for site in track.sites:
        check_mask(site.mask.hard, site.pattern, site.name)
        assert site.mask.law is None
    for number in (0, 1):
        block = [site for site in track.sites if f"layers.{number}." in site.name]
        kept = sum(int(site.mask.hard.sum()) for site in block)
        total = sum(site.weight.numel() for site in block)
        assert kept <= 0.505 * total  # rows of an unstructured pattern round to whole entries
        assert total * 0.5 - kept < max(site.weight.numel() for site in block) / 8
        by_name = {site.name.split(".")[-2]: site.pattern.density for site in block}
        assert by_name["down_proj"] > by_name["q_proj"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_values_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="candidates=1"):
        BESA(candidates=1)
    with pytest.raises(RecipeError, match="rate=0"):
        BESA(rate=0.0)
