"""Curvature and activation statistics against values worked out independently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sparseforge_core.errors import CurvatureUnavailable
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.activations import input_norms
from sparseforge_core.observe.curvature import Batch, Fisher
from tests.tiny import ARCHITECTURES, MIXTURES, sites_of, tiny_model, tokens


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


@pytest.mark.parametrize("architecture", [name for name in MIXTURES if name != "deepseek-original"])
def test_fused_experts_see_only_the_tokens_routed_to_them(architecture: str) -> None:
    """Against the products themselves: every multiplication by an expert's matrix in transformers' eager forward."""
    model = tiny_model(architecture)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj_bias"):
                parameter.normal_()  # GPT-OSS's experts have biases, zero until trained
    sites = [site for site in sites_of(model) if site.weight.ndim == 3]
    expected = {
        site.name: torch.zeros(site.matrix(site.weight).shape[0], site.matrix(site.weight).shape[-1]) for site in sites
    }
    norms = input_norms(model, sites_of(model), [tokens(4, 16), tokens(4, 16, seed=1)])
    with InputsOfProducts(sites, expected):
        for seed in (0, 1):
            model(tokens(4, 16, seed=seed), use_cache=False)
    for site in sites:
        assert norms[site.name].shape == (4, 1, site.matrix(site.weight).shape[-1])
        assert torch.allclose(norms[site.name][:, 0], expected[site.name].sqrt(), rtol=1e-3, atol=1e-6), site.name


class InputsOfProducts(TorchFunctionMode):
    """Adds up the squared rows that meet a slice of one of the sites' weights in a matrix product."""

    def __init__(self, sites: list[Site], sums: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.sums = sums
        self.places = {
            site.weight[expert].data_ptr(): (site.name, expert)
            for site in sites
            for expert in range(site.weight.shape[0])
        }

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (nn.functional.linear, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm):
            x, weight = args[0].detach(), args[1]
            stack = zip(x, weight, strict=True) if weight.ndim == 3 else [(x, weight)]
            for rows, matrix in stack:
                place = self.places.get(matrix.data_ptr())
                if place is not None:
                    self.sums[place[0]][place[1]] += rows.reshape(-1, rows.shape[-1]).square().sum(0)
        return function(*args, **(kwargs or {}))


def test_experts_in_modules_of_their_own_see_only_their_tokens() -> None:
    model = tiny_model("deepseek-original")
    expert = model.model.layers[1].mlp.experts[2]
    seen: list[torch.Tensor] = []
    expert.gate_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    norms = input_norms(model, sites_of(model), [tokens(4, 16)])
    assert 0 < len(seen[0]) < 64
    found = norms["model.layers.1.mlp.experts.2.gate_proj.weight"]
    assert torch.allclose(found, seen[0].norm(dim=0, keepdim=True), rtol=1e-4)


def test_an_expert_that_saw_no_token_is_an_error_by_number() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(
        CurvatureUnavailable, match=r"layers\.\d\.mlp\.experts\.gate_up_proj: experts \[.* in all\) saw no"
    ):
        input_norms(model, sites_of(model), [tokens(1, 1)])


def test_experts_that_route_in_a_way_we_do_not_know_are_refused_by_site() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.ones(2, 8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Routed()

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            out: torch.Tensor = self.experts(input_ids.float())
            return out

    model = Model()
    site = Site("experts.gate_up_proj", model.experts, "gate_up_proj", False, "experts")
    with pytest.raises(CurvatureUnavailable, match=r"site experts\.gate_up_proj: Routed: how it routes tokens"):
        input_norms(model, [site], [tokens(2, 4)])


def test_inputs_that_are_not_finite_are_refused_by_site() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = torch.nan
    with pytest.raises(CurvatureUnavailable, match="calibration inputs are not finite"):
        input_norms(model, sites_of(model), [tokens()])
