"""SparseGPT against a hand-worked row, and against a literal float64 reference written from its equations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.one_shot_agreement import literal_sparsegpt, literal_wanda
from sparseforge_core.errors import CurvatureUnavailable, RecipeError
from sparseforge_core.methods import SparseGPT, Wanda
from sparseforge_core.methods.base import Surroundings
from sparseforge_core.models.sites import assign_patterns
from sparseforge_core.opening import cell_folder, open_finished
from sparseforge_core.recipe import Cell, Recipe
from sparseforge_core.run import train_cell
from sparseforge_core.sparsity.patterns import BLOCK_16, Unstructured, check_mask, check_weight, nm
from sparseforge_core.sparsity.rules import ByRule, PatternRule
from sparseforge_core.sparsity.second_order import inverse_factor, sweep, tenfold_raises
from tests.tiny import sites_of, tiny_model, tiny_source, tokens


def around_of(model: nn.Module, pattern: object, batches: int = 4) -> Surroundings:
    return Surroundings(
        model=model,
        sites=assign_patterns(sites_of(model), pattern),  # type: ignore[arg-type]
        slorb=None,
        steps=0,
        calibration=lambda samples, length: list(tokens(samples, 16, seed=5).split(batches)),
    )


def test_a_row_worked_by_hand() -> None:
    """1:2 with H = [[2, 1], [1, 2]] and w = (1, 2), no damping.

    H^-1 = [[2, -1], [-1, 2]] / 3, so U = [[sqrt(2/3), -1/sqrt(6)], [0, sqrt(1/2)]]. Scores: 1 / (2/3) = 1.5 and
    4 / (1/2) = 8: the first entry goes. Its error 1 / sqrt(2/3) times U_01 = -1/sqrt(6) moves the second by +1/2:
    2.5 minimises (w - w^)^T H (w - w^) over the second entry, for 2 * 1^2 + 2 * 1 * (-d) + 2 d^2 is least at d = 1/2.
    """
    factor = inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 0.0, "here")
    upper = torch.tensor([[(2 / 3) ** 0.5, -(6**-0.5)], [0.0, 0.5**0.5]])
    assert torch.allclose(factor.upper, upper, atol=1e-6)
    new, keep = sweep(torch.tensor([[1.0, 2.0]]), factor, nm(1, 2), 128)
    assert keep.tolist() == [[False, True]]
    assert torch.allclose(new, torch.tensor([[0.0, 2.5]]), atol=1e-5)


@pytest.mark.parametrize("width", [4, 12, 128])
@pytest.mark.parametrize(
    "pattern", [nm(2, 4), nm(4, 8), BLOCK_16, Unstructured(density=0.4), Unstructured(density=0.4, scope="matrix")]
)
def test_a_sweep_keeps_the_pattern_and_beats_pruning_without_update(pattern: object, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    w = torch.randn(32, 48, generator=generator)
    hessian = 2 * x.T @ x
    new, keep = sweep(w, inverse_factor(hessian, 0.01, "here"), pattern, width)  # type: ignore[arg-type]
    check_mask(keep, pattern, "here")  # type: ignore[arg-type]
    assert bool((new[~keep] == 0).all())

    def error(pruned: torch.Tensor) -> float:
        return float(((pruned - w) @ x.T).square().sum())

    assert error(new) < 0.85 * error(w * keep)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_a_tiny_model_agrees_with_the_literal_reference(true_sequential: bool) -> None:
    model, reference = tiny_model("llama"), tiny_model("llama")
    batches = list(tokens(12, 16, seed=5).split(4))
    track = SparseGPT(samples=12, length=16, true_sequential=true_sequential).start(around_of(model, nm(2, 4)))
    masks, weights = literal_sparsegpt(reference, batches, true_sequential=true_sequential)
    agreed = sum(int((site.mask.hard == masks[site.name]).sum()) for site in track.sites)
    assert agreed / sum(mask.numel() for mask in masks.values()) >= 0.999
    same = [site for site in track.sites if torch.equal(masks[site.name], site.mask.hard)]
    assert len(same) >= len(track.sites) // 2
    for site in same:
        assert torch.allclose(site.weight.double(), weights[site.name], rtol=1e-3, atol=1e-5), site.name


def test_wanda_on_a_tiny_model_is_the_literal_reference() -> None:
    model, reference = tiny_model("llama"), tiny_model("llama")
    track = Wanda(samples=12, length=16).start(around_of(model, nm(2, 4)))
    masks = literal_wanda(reference, list(tokens(12, 16, seed=5).split(4)))
    agreed = sum(int((site.mask.hard == masks[site.name]).sum()) for site in track.sites)
    assert agreed / sum(mask.numel() for mask in masks.values()) >= 0.999


def test_sites_with_one_input_may_have_different_patterns() -> None:
    model = tiny_model("llama")
    keys = PatternRule(sites="*.k_proj.weight", pattern=nm(1, 4))
    choice = ByRule(rules=(keys, PatternRule(sites="*[!k]_proj.weight", pattern=nm(2, 4))))
    track = SparseGPT(samples=12, length=16).start(around_of(model, choice))
    for site in track.sites:
        check_mask(site.mask.hard, nm(1, 4) if "k_proj" in site.name else nm(2, 4), site.name)


def test_experts_each_have_their_own_hessian() -> None:
    model = tiny_model("deepseek_moe")
    track = SparseGPT(samples=12, length=16).start(around_of(model, nm(2, 4)))
    for site in track.sites:
        check_mask(site.matrix(site.mask.hard), nm(2, 4), site.name)
    before = sites_of(tiny_model("deepseek_moe"))
    for site, old in zip(track.sites, before, strict=True):
        assert not torch.equal(site.weight * site.mask.hard, old.weight * site.mask.hard), site.name


def test_a_hessian_that_is_not_positive_definite_is_damped_more() -> None:
    """[[1, 1.05], [1.05, 1]] has the eigenvalue -0.05: 1 % of damping leaves it indefinite, 10 % does not."""
    factor = inverse_factor(torch.tensor([[1.0, 1.05], [1.05, 1.0]]), 0.01, "here")
    assert factor.damping == pytest.approx(0.1)
    assert tenfold_raises(factor.damping, 0.01) == 1
    inverse = torch.tensor([[1.1, 1.05], [1.05, 1.1]]).inverse()
    assert torch.allclose(factor.upper.T @ factor.upper, inverse, rtol=1e-4)
    with pytest.raises(CurvatureUnavailable, match=r"site q: .*not positive definite even with 0\.1"):
        inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 1e-4, "site q")


def test_a_singular_hessian_is_damped_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    around = around_of(model, nm(2, 4))
    track = SparseGPT(samples=4, length=16).start(around)
    site = track.sites[0]
    indefinite = torch.eye(64) + 1.05 * (torch.ones(64, 64) - torch.eye(64))
    track.prepare(indefinite, site)
    assert track.raised == {site.name: pytest.approx(0.1)}
    assert f"site {site.name}: the Hessian was not positive definite" in caplog.text
    assert track.findings() == {"damping_raised_sites": 1, "damping_raised_most": 1}


def test_dead_inputs_lose_their_weights() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 0.0  # this input of q, k and v is always zero
    track = SparseGPT(samples=12, length=16).start(around_of(model, nm(2, 4)))
    query = next(site for site in track.sites if site.name.endswith("0.self_attn.q_proj.weight"))
    assert bool((query.weight[:, 5] == 0).all())
    assert track.findings() == {"damping_raised_sites": 0, "damping_raised_most": 0}


def test_a_cell_is_pruned_from_the_cpu_and_its_findings_are_stored(home: Path) -> None:
    source = tiny_source("llama")
    recipe = Recipe(
        model=source,
        method=SparseGPT(samples=8, length=32),
        corpus=source.tokenizer.corpus,  # type: ignore[attr-defined]
        pattern=nm(2, 4),
    )
    cell = Cell(recipe=recipe)
    rows = json.loads(train_cell(cell, cell_folder(home, cell) / "train", home).read_text())["measurements"]
    values = {row["metric"]: row["value"] for row in rows}
    assert values["damping_raised_sites"] == 0
    assert values["coverage"] > 0.5
    for site in sites_of(open_finished(cell, home)):
        check_weight(site.weight, nm(2, 4), site.name)


def test_bad_values_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="samples=0"):
        SparseGPT(samples=0)
    with pytest.raises(RecipeError, match="damping=0"):
        SparseGPT(damping=0.0)
