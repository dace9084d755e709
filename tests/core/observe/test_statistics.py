"""Curvature and activation statistics against values worked out independently."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseforge_core.errors import CurvatureUnavailable
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.activations import input_norms
from sparseforge_core.observe.curvature import Batch, Fisher
from tests.tiny import ARCHITECTURES, sites_of, tiny_model, tokens


def one_site(outputs: int = 3) -> tuple[nn.Linear, Site, Batch]:
    layer = nn.Linear(4, outputs, bias=False)
    optimizer = torch.optim.SGD(layer.parameters())
    unused = {"tokens": torch.zeros(1, 1), "loss": torch.add, "predictions": torch.sum, "optimizer": optimizer}
    return layer, Site("layer.weight", layer, "weight", False, "mlp"), Batch(step=1, model=layer, **unused)


def test_fisher_is_the_bias_corrected_average_of_squared_gradients() -> None:
    layer, site, batch = one_site()
    average = Fisher(decay=0.9).start([site])
    gradients = [torch.randn(3, 4) for _ in range(5)]
    for gradient in gradients:
        layer.weight.grad = gradient.clone()
        average.observe(batch)
    weights = torch.tensor([0.1 * 0.9 ** (4 - i) for i in range(5)])
    expected = sum(w * g**2 for w, g in zip(weights, gradients, strict=True)) / weights.sum()
    assert torch.allclose(average.of(site), expected, rtol=1e-5)


def test_fisher_converges_to_the_curvature_of_a_linear_gaussian_model() -> None:
    """For squared error with unit noise at the optimum, E[g g] equals the Hessian's diagonal E[x_j^2]."""
    torch.manual_seed(0)
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0])
    layer, site, batch = one_site(outputs=1)
    average = Fisher(decay=0.9998).start([site])
    for _ in range(6000):
        x = torch.randn(1, 4) * scale
        noise = torch.randn(1, 1)
        layer.weight.grad = (noise * x).detach()
        average.observe(batch)
    assert torch.allclose(average.of(site)[0], scale**2, rtol=0.12)


def test_a_site_without_a_gradient_is_an_error_by_name() -> None:
    _, site, batch = one_site()
    average = Fisher().start([site])
    with pytest.raises(CurvatureUnavailable, match=r"no gradient for 1 of 1 sites .*layer\.weight"):
        average.observe(batch)
    with pytest.raises(CurvatureUnavailable, match="no gradient was observed"):
        average.of(site)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_input_norms_are_those_of_the_inputs_the_modules_received(architecture: str) -> None:
    model = tiny_model(architecture)
    sites = [site for site in sites_of(model) if site.weight.ndim == 2]
    seen: dict[str, torch.Tensor] = {}
    for site in sites:
        site.module.register_forward_pre_hook(
            lambda module, args, name=site.name: seen.__setitem__(name, args[0].detach().reshape(-1, args[0].shape[-1]))
        )
    norms = input_norms(model, sites_of(model), [tokens(4, 16)])
    for site in sites:
        assert torch.allclose(norms[site.name], seen[site.name].norm(dim=0, keepdim=True), rtol=1e-4)
        assert norms[site.name].shape[-1] == site.matrix(site.weight).shape[-1]


def test_experts_see_only_the_tokens_routed_to_them() -> None:
    model = tiny_model("deepseek_moe")
    experts = model.model.layers[1].mlp.experts
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts.register_forward_pre_hook(lambda module, args: calls.append((args[0], args[1])))
    sites = [site for site in sites_of(model) if site.weight.ndim == 3]
    norms = input_norms(model, sites, [tokens(4, 16)])
    ((hidden, chosen),) = calls
    for expert in range(4):
        routed = hidden[[expert in row for row in chosen.tolist()]]
        expected = routed.norm(dim=0)
        assert torch.allclose(norms["model.layers.1.mlp.experts.gate_up_proj"][expert, 0], expected, rtol=1e-4)
    assert norms["model.layers.1.mlp.experts.down_proj"].shape == (4, 1, 32)


def test_inputs_that_are_not_finite_are_refused_by_site() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = torch.nan
    with pytest.raises(CurvatureUnavailable, match="calibration inputs are not finite"):
        input_norms(model, sites_of(model), [tokens()])
