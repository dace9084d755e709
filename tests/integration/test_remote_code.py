"""Code from the hub: never by default, only from a pinned commit, and then through the whole path of a cell.

The repository is a real one in the hub's own cache layout, so that nothing is fetched: DeepSeek-MoE's original layout
with its own modelling file.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file
from torch import Tensor

from sparseforge_core import specs
from sparseforge_core.checkpoint import verify
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import RecipeError, UnsupportedModel
from sparseforge_core.evaluate.suites import PerplexitySuite
from sparseforge_core.methods import MagnitudePruning
from sparseforge_core.models import hub
from sparseforge_core.models.deepseek import DeepseekConfig, FusedDeepseekForCausalLM
from sparseforge_core.models.families import family_of
from sparseforge_core.models.sites import coverage
from sparseforge_core.models.sources import Hub
from sparseforge_core.models.tiny import tiny_config
from sparseforge_core.opening import cell_folder, open_finished, open_source
from sparseforge_core.recipe import Cell, Recipe
from sparseforge_core.run import evaluate_cell, train_cell
from sparseforge_core.sparsity.patterns import check_weight, nm
from tests import deepseek_original
from tests.tiny import tiny_source, tokens

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CORPUS = Synthetic(documents_count=200)
CODE = {
    "AutoConfig": "modeling_deepseek.DeepseekConfig",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
}


@pytest.mark.parametrize("revision", ["main", "0123456", COMMIT.upper(), COMMIT + "0", ""])
def test_code_of_the_hub_runs_only_from_a_full_commit_hash(revision: str) -> None:
    with pytest.raises(RecipeError, match="remote_code=True with revision="):
        Hub(id="example/model", revision=revision, remote_code=True)
    assert hub.code_of(Hub(id="example/model", revision=revision)) == {"trust_remote_code": False}


def test_the_pinned_commit_is_that_of_the_code_too_and_old_keys_stay() -> None:
    pinned = Hub(id="example/model", revision=COMMIT, remote_code=True)
    assert hub.code_of(pinned) == {"trust_remote_code": True, "code_revision": COMMIT}
    assert specs.encode(Hub(id="example/model", revision=COMMIT)).keys() == {"id", "kind", "revision", "spec_revision"}


@pytest.fixture
def cache(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with two repositories at COMMIT: weights, configuration, code and tokenizer of one model.

    `example/deepseek` has the model type that we build ourselves, `example/unknown` one that nobody has.
    """
    model = deepseek_original.DeepseekForCausalLM(deepseek_original.DeepseekConfig(vocab_size=300))
    for name, model_type in (("deepseek", "deepseek"), ("unknown", "deepseek_unheard_of")):
        folder = tmp_path / f"models--example--{name}" / "snapshots" / COMMIT
        model.save_pretrained(folder)
        hub.load_tokenizer(tiny_source("llama"), home).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": CODE, "model_type": model_type}))
        shutil.copy(deepseek_original.__file__, folder / "modeling_deepseek.py")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return tmp_path


def cell_of(name: str, **changes: Any) -> Cell:
    source = Hub(id=f"example/{name}", revision=COMMIT, **changes)
    return Cell(recipe=Recipe(model=source, method=MagnitudePruning(), corpus=CORPUS, pattern=nm(2, 4)))


def trained(cell: Cell, home: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """The cell's train folder, its measurements by metric, and the weights of its finished model, by stored name."""
    folder = cell_folder(home, cell) / "train"
    rows = {row["metric"]: row for row in json.loads(train_cell(cell, folder, home).read_text())["measurements"]}
    weights = {name: x for file in (folder / "final").glob("*.safetensors") for name, x in load_file(file).items()}
    assert rows["coverage"]["detail"]["family"] == "deepseek"
    assert rows["coverage"]["detail"]["excluded"].keys() == {"embedding", "head", "router", "vectors"}
    experts = [name for name in weights if ".mlp.experts." in name]
    assert len(experts) == 4 * 3
    for name in experts:
        check_weight(weights[name], nm(2, 4), name)
    return folder, rows, weights


def test_a_repository_with_its_own_code_is_pruned_saved_and_measured(home: Path, cache: Path) -> None:
    cell = cell_of("deepseek", remote_code=True)
    folder, _, _ = trained(cell, home)
    suite = PerplexitySuite(name="heldout", text="heldout", window=16, limit=4)
    body = json.loads(evaluate_cell(cell, suite, home / "out", home).read_text())
    assert body["measurements"][0]["value"] > 1.0
    started = sys.modules[type(open_source(cell.recipe.model, home, cell.seed)).__module__]
    assert COMMIT in str(started.__file__), "other code than the commit's ran"
    # The code travels with the finished model, under the manifest's hashes.
    assert (folder / "final" / "modeling_deepseek.py").read_text() == Path(deepseek_original.__file__).read_text()
    assert "modeling_deepseek.py" in verify(folder / "final")["files"]
    finished = sys.modules[type(open_finished(cell, home)).__module__]
    assert Path(str(finished.__file__)).is_relative_to(cache / "modules")


def test_our_own_classes_of_deepseek_make_the_same_model_without_running_its_code(home: Path, cache: Path) -> None:
    theirs, ours = cell_of("deepseek", remote_code=True), cell_of("deepseek")
    x = tokens()
    with torch.no_grad():
        built = open_source(ours.recipe.model, home, ours.seed)
        assert isinstance(built, FusedDeepseekForCausalLM)
        before = built(x).logits
        assert not (cache / "modules").exists(), "code was copied"
        assert torch.allclose(before, open_source(theirs.recipe.model, home, theirs.seed)(x).logits, atol=1e-5)
    weights = trained(ours, home)[2]
    for name, weight in trained(theirs, home)[2].items():
        assert torch.equal(weight, weights[name]), name
    finished = open_finished(ours, home)
    with torch.no_grad():
        assert torch.allclose(finished(x).logits, open_finished(theirs, home)(x).logits, atol=1e-5)


def test_a_repository_that_needs_its_code_is_refused_where_the_recipe_does_not_ask_for_it(
    home: Path, cache: Path
) -> None:
    with pytest.raises(UnsupportedModel, match="say remote_code=True beside a full commit hash"):
        train_cell(cell_of("unknown"), home / "out", home)
    assert not (cache / "modules").exists(), "code was copied"


def test_deepseek_moe_16b_has_the_parameters_that_are_published() -> None:
    config = DeepseekConfig(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
    )
    with torch.device("meta"):
        model = FusedDeepseekForCausalLM(config)
    cover = coverage(model, family_of("deepseek"))
    assert round(cover.total / 1e6, 1) == 16375.7
    assert cover.included["experts"] == 27 * 64 * 3 * 1408 * 2048
    assert cover.share > 0.97


def test_a_deepseek_that_routes_otherwise_is_refused_by_the_field() -> None:
    config = tiny_config(tiny_source("deepseek"), 64, 0)
    config.norm_topk_prob = True
    with pytest.raises(UnsupportedModel, match="norm_topk_prob"):
        hub.from_config(config)
