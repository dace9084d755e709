"""The automatic family: it agrees with every declaration, covers what nobody declared, refuses what it cannot see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from sparseforge_core import specs
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import UnsupportedModel
from sparseforge_core.methods import DenseControl, MagnitudePruning
from sparseforge_core.models.families import FAMILIES
from sparseforge_core.models.families.automatic import automatic_family
from sparseforge_core.models.sites import assign_patterns, coverage, find_sites
from sparseforge_core.models.tiny import CONFIGURATIONS
from sparseforge_core.opening import cell_folder, open_family, open_finished
from sparseforge_core.recipe import Cell, Recipe, Trained, TrainPlan
from sparseforge_core.run import train_cell
from sparseforge_core.sparsity.patterns import check_weight, nm
from tests.tiny import EVERY_ARCHITECTURE, sites_of, tiny_model, tiny_source, tokens

UNDECLARED = tuple(name for name in CONFIGURATIONS if name not in EVERY_ARCHITECTURE)


def bare(model_type: str, block: nn.Module) -> nn.Module:
    """A model of one block that holds what a test puts into it, beside a Linear."""
    model = nn.Module()
    model.config = transformers.PretrainedConfig()
    model.config.model_type = model_type
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    block.mlp = nn.Linear(8, 8)
    model.layers = nn.ModuleList([block])
    return model


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_it_agrees_with_every_declared_family(architecture: str) -> None:
    model = tiny_model(architecture)
    automatic = automatic_family(model)
    assert automatic.name == "automatic"
    found, declared = find_sites(model, automatic), sites_of(model)
    assert [(s.name, s.transposed) for s in found] == [(s.name, s.transposed) for s in declared]
    cover = coverage(model, automatic)
    assert cover.family == "automatic"
    assert cover.excluded.keys() <= {"embedding", "head", "vectors", "router", "expert-bias", "norm", "vector"}


@pytest.mark.parametrize("architecture", UNDECLARED)
def test_undeclared_architectures_keep_the_contract(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    assert model.config.model_type not in FAMILIES
    before, keys = model(tokens()).logits, sorted(model.state_dict())
    family = automatic_family(model)
    sites = assign_patterns(find_sites(model, family), nm(2, 4))
    for site in sites:
        site.attach(None)
    assert torch.equal(model(tokens()).logits, before)
    for site in sites:
        site.mask.harden(site.weight.detach().abs(), nm(2, 4))
        site.mask.freeze(site.weight, nm(2, 4), site.name)
        site.squash()
    assert sorted(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.allclose(loaded(tokens()).logits, model(tokens()).logits, atol=1e-6)
    for site in find_sites(loaded, automatic_family(loaded)):
        check_weight(site.matrix(site.weight), nm(2, 4), site.name)
    in_blocks = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and (".h." in n or "s." in n))
    assert coverage(model, family).masked >= 0.95 * (in_blocks - sum(coverage(model, family).excluded.values()))


def test_a_recipe_must_ask_for_it_and_its_results_say_so(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny_source("nemotron", family="automatic")
    recipe = Recipe(model=source, method=MagnitudePruning(), corpus=Synthetic(documents_count=50), pattern=nm(2, 4))
    cell = Cell(recipe=recipe)
    rows = json.loads(train_cell(cell, cell_folder(home, cell) / "train", home).read_text())["measurements"]
    (cover,) = [row for row in rows if row["metric"] == "coverage"]
    assert cover["detail"]["family"] == "automatic"
    assert cover["detail"]["included"] == {"attention": 32768, "mlp": 32768}
    assert "family automatic: 65,536 of" in caplog.text
    model = open_finished(cell, home)
    for site in find_sites(model, automatic_family(model)):
        check_weight(site.matrix(site.weight), nm(2, 4), site.name)
    silent = Cell(recipe=Recipe(**{**vars(recipe), "model": tiny_source("nemotron")}))
    with pytest.raises(UnsupportedModel, match=r"no family declares this model: unknown model_type 'nemotron'"):
        train_cell(silent, home / "silent", home)
    assert "family" not in specs.encode(tiny_source("nemotron")), "old keys must not change"


def test_a_model_that_another_cell_trained_keeps_the_choice_of_its_first_source(home: Path) -> None:
    corpus, plan = Synthetic(documents_count=50), TrainPlan(steps=2, sequences=2, length=16)
    source = tiny_source("mpt", family="automatic")
    first = Cell(recipe=Recipe(model=source, method=DenseControl(), corpus=corpus, train=plan))
    train_cell(first, cell_folder(home, first) / "train", home)
    recipe = Recipe(model=Trained(recipe=first.recipe), method=MagnitudePruning(), corpus=corpus, pattern=nm(2, 4))
    second = Cell(recipe=recipe)
    rows = json.loads(train_cell(second, cell_folder(home, second) / "train", home).read_text())["measurements"]
    (cover,) = [row for row in rows if row["metric"] == "coverage"]
    assert cover["detail"]["family"] == "automatic"
    assert open_family(recipe.model, open_finished(second, home)).name == "automatic"


def test_a_matrix_that_it_cannot_classify_is_an_error_naming_it() -> None:
    block = nn.Module()
    block.convolution = nn.Conv1d(8, 8, 4)
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.convolution\.weight \(8, 8, 4\) belong to no Linear"):
        automatic_family(bare("convolutional", block))


def test_stacked_experts_that_do_not_say_how_they_are_stored_are_an_error() -> None:
    block = nn.Module()
    block.experts = nn.Module()
    block.experts.weight = nn.Parameter(torch.ones(4, 8, 8))
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.experts\.weight"):
        automatic_family(bare("stacked", block))


def test_what_stays_dense_in_a_block_has_a_rule() -> None:
    block = nn.Module()
    block.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    block.chooser = nn.Linear(8, 3)
    block.weigher = nn.Linear(8, 1)
    block.positions = nn.Embedding(5, 8)
    block.scale = nn.ParameterList([nn.Parameter(torch.ones(1, 8))])
    model = bare("mixed", block)
    cover = coverage(model, automatic_family(model))
    assert cover.excluded == {"router": 32, "embedding": 40, "vector": 8, "vectors": 3 * 8 + 3 + 1 + 8}
    assert cover.included == {"experts": 3 * 64, "mlp": 64}


def test_models_without_blocks_or_without_matrices_in_them_are_refused() -> None:
    model = nn.Module()
    model.layer = nn.Linear(8, 8)
    with pytest.raises(UnsupportedModel, match="no repeated blocks"):
        automatic_family(model)
