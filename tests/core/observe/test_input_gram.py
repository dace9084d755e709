"""The inverse Gram statistic against its definition: what removing a weight costs once the others make up for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparseforge_core.errors import CurvatureUnavailable, RecipeError
from sparseforge_core.observe.blocks import stream_blocks
from sparseforge_core.observe.input_gram import input_grams, inverse_gram_diagonals
from sparseforge_core.sparsity.criteria import SparseGPTScore
from tests.tiny import ARCHITECTURES, sites_of, tiny_model, tokens

DAMPING = 0.01


def inputs_of(model: Any, module: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    """All that `module` receives, `[tokens, in]`, float64."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().flatten(0, -2).double()))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "deepseek_moe"])
def test_diagonals_are_those_of_the_inverse_for_every_family(architecture: str) -> None:
    model, batches = tiny_model(architecture), [tokens(4, 16), tokens(3, 16, seed=1)]
    sites = sites_of(model)
    found = inverse_gram_diagonals(model, sites, batches, DAMPING)
    for site in sites:
        x = inputs_of(model, site.module, batches)
        h = x.T @ x / x.shape[0]
        h += DAMPING * h.diagonal().mean() * torch.eye(h.shape[0], dtype=h.dtype)
        assert torch.allclose(found[site.name].double(), torch.linalg.inv(h).diagonal()[None], rtol=1e-3), site.name
        assert (
            SparseGPTScore().score(site.matrix(site.weight), found[site.name]).shape == site.matrix(site.weight).shape
        )


def test_a_score_is_the_loss_of_removing_an_entry_and_refitting_its_row() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64), torch.randn(6).double()
    h = x.T @ x / 200
    scores = SparseGPTScore().score(w[None], torch.linalg.inv(h).diagonal()[None])[0]
    for j in range(6):
        rest = [k for k in range(6) if k != j]
        refitted = torch.linalg.lstsq(x[:, rest], (x @ w).unsqueeze(-1)).solution.squeeze(-1)
        loss = (x[:, rest] @ refitted - x @ w).square().mean()
        assert float(scores[j]) == pytest.approx(float(loss), rel=1e-6)


def test_experts_have_a_matrix_each_over_the_tokens_routed_to_them() -> None:
    model, batches = tiny_model("deepseek_moe"), [tokens(4, 16)]
    sites = [site for site in sites_of(model) if site.weight.ndim == 3]
    calls: list[Any] = []
    model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda m, args: calls.append((args[0], args[1])))
    (block,) = stream_blocks(model, sites, batches)
    calls.clear()
    grams = input_grams(block)
    ((hidden, chosen),) = calls
    gram, counts = grams["model.layers.1.mlp.experts.gate_up_proj"]
    for expert in range(4):
        routed = hidden[(chosen == expert).any(-1)]
        assert int(counts[expert]) == routed.shape[0]
        assert torch.allclose(gram[expert], routed.T @ routed, rtol=1e-4, atol=1e-5)
    found = inverse_gram_diagonals(model, sites, batches)
    assert found["model.layers.1.mlp.experts.down_proj"].shape == (4, 1, 32)
    assert all(bool((x > 0).all()) for x in found.values())


def test_the_text_runs_through_each_block_once_to_be_seen_and_once_to_go_on() -> None:
    model = tiny_model("llama", layers=3)
    runs = [0, 0, 0]

    def count(index: int) -> Any:
        return lambda *_: runs.__setitem__(index, runs[index] + 1)

    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(count(index))
    inverse_gram_diagonals(model, sites_of(model), [tokens(2, 8), tokens(2, 8)])
    # The first block also runs once on one sequence, which shows what a block answers; after the last nothing goes on.
    assert runs == [5, 4, 2]


def test_what_has_no_inverse_is_refused_by_site() -> None:
    model = tiny_model("deepseek_moe")
    sites = [site for site in sites_of(model) if site.weight.ndim == 3]
    with pytest.raises(CurvatureUnavailable, match=r"experts\.gate_up_proj, experts \[.*\]: no calibration token"):
        inverse_gram_diagonals(model, sites, [tokens(1, 1)])
    with pytest.raises(RecipeError, match="damping=0"):
        inverse_gram_diagonals(model, sites, [tokens()], damping=0.0)
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight[:] = torch.nan
    with pytest.raises(CurvatureUnavailable, match=r"layers\.0\.self_attn\.q_proj\.weight: .*not finite"):
        inverse_gram_diagonals(broken, sites_of(broken), [tokens()])
