"""Blocks whose products are joined compute what plain ones do, with fewer products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from benchmarks.steps import Shape, config_of
from sparseforge_core.models import joining
from sparseforge_core.models.families import family_of
from sparseforge_core.models.heads import replaced
from sparseforge_core.models.hub import from_config
from sparseforge_core.models.regions import compiled_blocks
from sparseforge_core.models.sites import assign_patterns, find_sites
from sparseforge_core.sparsity.patterns import nm

SHAPE = Shape(2, 32, 64, 4, 2, 64, True, 2, 8)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Groups joined in each graph, and the products left in it."""
    found: list[tuple[int, int]] = []
    join = joining.join

    def counting(graph: fx.Graph) -> int:
        groups = join(graph)
        found.append((groups, sum(node.target is joining.MM for node in graph.nodes)))
        return groups

    monkeypatch.setattr(joining, "join", counting)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def _joined(graph_module: fx.GraphModule, _: Any) -> fx.GraphModule:
    joining.join(graph_module.graph)
    graph_module.recompile()
    return graph_module


def _parted(graph_module: fx.GraphModule, inputs: Any, **settings: Any) -> Any:
    return min_cut_rematerialization_partition(_joined(graph_module, inputs), inputs, **settings)


BACKEND = aot_autograd(
    fw_compiler=lambda made, _: made,
    inference_compiler=_joined,
    partition_fn=_parted,
    decompositions=select_decomp_table(),
)
"""Traces with the backward and joins, then runs what that gives: nobody waits for a compiler."""


def joined_only(module: nn.Module) -> Any:
    return torch.compile(module, backend=BACKEND, fullgraph=True, dynamic=False)


def with_joined_blocks(model: nn.Module) -> Any:
    blocks = nn.ModuleList(joined_only(block) for block in model.model.layers)
    return replaced(model, "model.layers", blocks)


def masked_llama() -> nn.Module:
    torch.manual_seed(0)
    model = from_config(config_of(SHAPE)).eval()
    for site in assign_patterns(find_sites(model, family_of("llama")), nm(2, 4)):
        site.attach(None)
        site.mask.view.data = (torch.rand_like(site.mask.view) > 0.5).float()
    return model


def gradients(model: nn.Module, called: nn.Module, *, bf16: bool) -> Tensor:
    model.zero_grad()
    tokens = torch.arange(16).view(2, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = called(input_ids=tokens, use_cache=False).logits
    nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("bf16", [False, True])
def test_joined_blocks_have_the_gradients_of_plain_ones(counted: list[tuple[int, int]], bf16: bool) -> None:
    model = masked_llama()
    exact = gradients(model, model, bf16=False)
    plain = gradients(model, model, bf16=bf16)
    joined = gradients(model, with_joined_blocks(model), bf16=bf16)
    # Of 7 products there and 14 back, q k v and gate up are one each.
    assert counted == [(2, 12)]
    off, usual = ((found - exact).norm() / exact.norm() for found in (joined, plain))
    assert off < (1.2 * usual if bf16 else 1e-5)


def test_a_teacher_without_gradients_is_joined_too(counted: list[tuple[int, int]]) -> None:
    model = masked_llama()
    tokens = torch.arange(16).view(2, 8)
    with torch.no_grad():
        plain = model(input_ids=tokens, use_cache=False).logits
        found = with_joined_blocks(model)(input_ids=tokens, use_cache=False).logits
    assert counted == [(2, 4)]
    torch.testing.assert_close(found, plain)


def test_what_has_nothing_to_join_stays_as_it_is(counted: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
    x = torch.randn(4, 8)
    torch.testing.assert_close(joined_only(chain)(x), chain(x))
    assert [groups for groups, _ in counted] == [0]


def test_the_compiler_takes_the_pass(counted: list[tuple[int, int]]) -> None:
    model = masked_llama()
    plain = gradients(model, model, bf16=False)
    found = gradients(model, compiled_blocks(model, fullgraph=True, joined=True), bf16=False)
    assert counted == [(2, 12)]
    torch.testing.assert_close(found, plain)


def test_a_gradient_that_is_no_plain_sum_is_left_alone(counted: list[tuple[int, int]]) -> None:
    class Odd(nn.Module):
        """Two products of an input, of which one reaches it halved: their gradients do not simply add up."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Parameter(torch.randn(n, 16)) for n in (8, 24))

        def forward(self, x: Tensor) -> Tensor:
            y = x + 0.5 * (x - x.detach()).sin()
            return (y @ self.one.t()).sum() + (y @ self.two.t()).square().sum() + y.square().sum()

    torch.manual_seed(0)
    odd = Odd()
    found = []
    for module in (odd, joined_only(odd)):
        odd.zero_grad()
        x = torch.arange(64.0).view(4, 16).div(64).requires_grad_()
        module(x).backward()
        found.append([x.grad, odd.one.grad, odd.two.grad])
    assert counted[0][0] == 1
    for plain, joined in zip(*found, strict=True):
        torch.testing.assert_close(joined, plain)
