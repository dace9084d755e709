"""Cells whose channels are put in order: found once, the same model, less lost, the same bits after a stop."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseforge_core import permuting
from sparseforge_core.errors import RecipeError, UnsupportedModel
from sparseforge_core.methods import AST, DenseControl, FrozenMask, Method, SparseGPT, Wanda
from sparseforge_core.models.channels import Channels, free_channels
from sparseforge_core.models.families import FAMILIES, Family, family_of
from sparseforge_core.models.sites import assign_patterns
from sparseforge_core.objective import Distill
from sparseforge_core.objective.hidden import HiddenMatch
from sparseforge_core.opening import cell_folder, open_finished
from sparseforge_core.permuting import put_in_order
from sparseforge_core.recipe import Cell, Recipe, TrainPlan
from sparseforge_core.run import train_cell
from sparseforge_core.sparsity.patterns import BLOCK_16, PatternChoice, Unstructured, nm
from sparseforge_core.sparsity.permutation import ChannelPermutation
from tests.core.train.stopping import whole_and_in_parts
from tests.tiny import sites_of, tiny_model, tiny_source, tokens

PERMUTATION = ChannelPermutation(samples=8, length=16)
PRIOR = SparseGPT(samples=4, length=16)


def recipe_of(method: Method, architecture: str = "llama", **changes: Any) -> Recipe:
    source = tiny_source(architecture)
    values: dict[str, Any] = {
        "model": source,
        "method": method,
        "corpus": source.tokenizer.corpus,  # type: ignore[attr-defined]
        "pattern": nm(2, 4),
        "train": TrainPlan(steps=4, sequences=2, length=16) if method.trains else TrainPlan(),
        "permutation": PERMUTATION,
    }
    return Recipe(**{**values, **changes})


def ordered(model: Any, home: Path, pattern: PatternChoice | None = None, **changes: Any) -> dict[str, Any]:
    family = changes.pop("family", family_of(model.config.model_type))
    sites = assign_patterns(sites_of(model), pattern or nm(2, 4))
    values: dict[str, Any] = {
        "calibration": lambda samples, length: list(tokens(samples, length, seed=5).split(4)),
        "device": torch.device("cpu"),
        "home": home,
        "about": {"model": "tiny"},
    }
    return put_in_order(model, family, sites, PERMUTATION, **{**values, **changes})


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon", "mixtral", "deepseek_v3", "gpt_oss"])
def test_groups_lose_less_and_the_model_computes_what_it_did(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    before = model(input_ids=tokens()).logits.detach()
    found = ordered(model, tmp_path)
    torch.testing.assert_close(model(input_ids=tokens()).logits, before, rtol=1e-3, atol=1e-4)
    assert 0 < found["lost_after"] < 0.97 * found["lost_before"] < 0.5
    assert model.training is False


def test_an_order_is_found_once_and_a_damaged_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = (tiny_model("llama") for _ in range(3))
    found = ordered(first, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(permuting, "_search", lambda *_: pytest.fail("it was there"))
        assert ordered(second, tmp_path) == found
    (path,) = (tmp_path / "permutations").glob("*.json")
    body = json.loads(path.read_text())
    stream = body["found"]["orders"]["residual stream"]
    stream[0] = stream[1]
    damaged = {"altered": json.dumps(body), "cut off": path.read_text()[:-9], "no body": "[]"}
    for what, text in damaged.items():
        path.write_text(text)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert ordered(third, tmp_path) == found, what
        assert "is damaged" in caplog.text, what
        third = tiny_model("llama")
    ordered(third, tmp_path)
    for other in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert ordered(tiny_model("llama"), tmp_path, about={"model": "another"})["key"] != found["key"]


def test_a_wrong_declaration_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: Any, family: Family) -> list[Channels]:
        *found, stream = free_channels(model, family)
        return [*found, Channels(stream.name, stream.size, stream.places[1:])]  # the embedding stays

    monkeypatch.setattr(permuting, "free_channels", forgetful)
    with pytest.raises(UnsupportedModel, match=r"the llama model computes something else .*leave `permutation` out"):
        ordered(tiny_model("llama"), tmp_path)


def test_a_layout_that_knows_nothing_of_a_masked_weight_s_inputs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attention_alone(model: Any, family: Family) -> list[Channels]:
        return [one for one in free_channels(model, family) if "mlp" not in one.name]

    monkeypatch.setattr(permuting, "free_channels", attention_alone)
    with pytest.raises(UnsupportedModel, match=r"what 2 masked weights read, such as model\.layers\.0\.mlp\.down_proj"):
        ordered(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "llama"])
def test_of_experts_in_one_tensor_each_reads_its_own_channels(architecture: str) -> None:
    model = tiny_model(architecture)
    sites = {site.name: site for site in assign_patterns(sites_of(model), nm(2, 4))}
    for one in permuting._orderable(free_channels(model, family_of(architecture)), list(sites.values())):
        for reader in one.readers:
            site = sites[reader.site.name]
            rows = reader.rows(site.matrix(site.weight))
            assert rows.shape == (reader.outputs, site.matrix(site.weight).shape[-1])
            if "experts " in one.channels.name:
                assert torch.equal(rows, site.matrix(site.weight[int(one.channels.name.split()[1])]))


def test_what_cannot_be_put_in_order_is_refused_before_any_work(tmp_path: Path) -> None:
    for pattern, said in ((BLOCK_16, "under pattern block-16"), (Unstructured(), "under pattern 50% by row")):
        with pytest.raises(RecipeError, match=said):
            ordered(tiny_model("llama"), tmp_path, pattern)
    with pytest.raises(RecipeError, match="values 0, 32 channels, do not divide into groups of 64"):
        ordered(tiny_model("llama", width=64), tmp_path, nm(32, 64))
    with pytest.raises(UnsupportedModel, match="family automatic"):
        ordered(tiny_model("opt"), tmp_path, family=replace(FAMILIES["opt"], name="automatic"))
    with pytest.raises(RecipeError, match="permutation: method 'dense-control' prunes nothing"):
        recipe_of(DenseControl(), pattern=None)
    matched = Distill(hidden=HiddenMatch())
    assert recipe_of(AST(), objective=matched), "the teacher is the model in its new order"
    with pytest.raises(RecipeError, match="permutation: hidden states are matched with those of another teacher"):
        recipe_of(AST(), objective=replace(matched, teacher=tiny_source("llama")))
    assert not (tmp_path / "permutations").exists()


@pytest.mark.parametrize("method", [Wanda(samples=4, length=16), FrozenMask(prior=PRIOR), AST()], ids=lambda m: m.kind)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "deepseek_moe"])
def test_a_cell_is_pruned_in_its_new_order(method: Method, architecture: str, tmp_path: Path) -> None:
    cell = Cell(recipe=recipe_of(method, architecture))
    body = json.loads(train_cell(cell, cell_folder(tmp_path, cell) / "train", tmp_path).read_text())
    assert body["context"]["permutation"]["lost_after"] < body["context"]["permutation"]["lost_before"]
    model = open_finished(cell, tmp_path)
    for site in sites_of(model):
        groups = site.matrix(site.weight).unflatten(-1, (-1, 4))
        assert int((groups != 0).sum(-1).max()) == 2, site.name


def test_a_cell_that_was_stopped_ends_in_the_same_bits(tmp_path: Path) -> None:
    cell = Cell(recipe=recipe_of(FrozenMask(prior=PRIOR), objective=Distill(kl_weight=0.5)))
    whole, parts = whole_and_in_parts(cell, tmp_path, 2)
    assert whole == parts
