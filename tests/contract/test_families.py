"""The contract of every family: nothing unaccounted, nothing changed at mask = 1, exact and loadable after export."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparseforge_core.errors import PatternViolation, UnsupportedModel
from sparseforge_core.models.families import FAMILIES, family_of
from sparseforge_core.models.families.base import rule
from sparseforge_core.models.sites import Site, assign_patterns, coverage, find_sites
from sparseforge_core.sparsity.patterns import BLOCK_16, Pattern, check_weight, nm
from sparseforge_core.sparsity.slorb import SLoRB
from tests.tiny import ARCHITECTURES, EVERY_ARCHITECTURE, MIXTURES, sites_of, tiny_model, tokens

every = pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
some = pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss", "deepseek-original"])
"""One of each kind of site: Linear, Conv1D, transposed fused experts, an expert in modules of its own."""


def logits_of(model: Any) -> Tensor:
    """Logits of a fixed batch, `[2, 16, vocabulary]`."""
    with torch.no_grad():
        logits = model(tokens(), use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits


def stored_keys(folder: Path) -> dict[str, torch.Size]:
    """Names and shapes in the weight files of a saved model."""
    return {name: x.shape for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def prune(sites: list[Site], pattern: Pattern) -> None:
    """Attach masks and freeze them at the largest weights."""
    for site in assign_patterns(sites, pattern):
        site.attach(None)
        site.mask.harden(site.weight.detach().abs(), pattern)
        site.mask.freeze(site.weight, pattern, site.name)


def test_every_declared_model_type_has_a_model_here() -> None:
    assert {tiny_model(name).config.model_type for name in EVERY_ARCHITECTURE} == set(FAMILIES)
    assert len(FAMILIES) >= 40


@every
def test_every_matrix_is_covered_or_excluded_by_a_named_rule(architecture: str) -> None:
    model = tiny_model(architecture)
    sites = sites_of(model)
    cover = coverage(model, family_of(model.config.model_type))
    assert cover.masked + sum(cover.excluded.values()) == cover.total == sum(p.numel() for p in model.parameters())
    assert cover.masked == sum(site.weight.numel() for site in sites)
    assert cover.share > 0.7
    blocks = {name for name, p in model.named_parameters() if p.ndim >= 2 and re.search(r"\.\d+\.", name)}
    left = blocks - {site.name for site in sites}
    # In a block only what chooses or weighs experts, and norms or biases stored as matrices, may stay dense.
    assert all(re.search(r"\.gate\.|\.router\.|expert_gate|bias|_norm", name) for name in left), left
    assert bool({site.group for site in sites} & {"experts"}) == (architecture in MIXTURES)


@every
def test_nothing_changes_at_mask_one_and_the_pruned_model_survives_a_round_trip(
    architecture: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    before, keys = logits_of(model), sorted(model.state_dict())
    model.save_pretrained(tmp_path / "dense")
    sites = sites_of(model)
    for site in sites:
        site.attach(SLoRB(k=4))
    assert torch.equal(logits_of(model), before)
    for site in sites:
        site.mask.set_view(1.0)
        site.squash()
    assert torch.equal(logits_of(model), before)
    assert sorted(model.state_dict()) == keys

    prune(sites, nm(2, 4))
    masked = logits_of(model)
    assert not torch.equal(masked, before)
    for site in sites:
        site.squash()
        check_weight(site.matrix(site.weight), nm(2, 4), site.name)
        assert not bool((site.weight == 0).logical_and(torch.signbit(site.weight)).any()), "a pruned weight is -0"
    assert sorted(model.state_dict()) == keys
    assert torch.equal(logits_of(model), masked)
    model.save_pretrained(tmp_path / "sparse")
    assert stored_keys(tmp_path / "sparse") == stored_keys(tmp_path / "dense")
    loaded, info = type(model).from_pretrained(tmp_path / "sparse", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.allclose(logits_of(loaded), masked, atol=1e-6)
    again = find_sites(loaded, family_of(loaded.config.model_type))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(sites, again, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_16_fits_every_family_of_the_demo(architecture: str) -> None:
    model = tiny_model(architecture)
    sites = sites_of(model)
    prune(sites, BLOCK_16)
    for site in sites:
        site.squash()
        check_weight(site.matrix(site.weight), BLOCK_16, site.name)
    assert bool(torch.isfinite(logits_of(model)).all())


@pytest.mark.parametrize("architecture", [*MIXTURES, "llama", "gpt2"])
def test_groups_run_along_the_inputs(architecture: str) -> None:
    """Found by moving numbers, not by names: a weight whose input column is zero cannot feel that input."""
    model = tiny_model(architecture)
    calls = {}
    sites = sites_of(model)
    for site in sites:
        site.module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.__setitem__(module, (args, kwargs)), with_kwargs=True
        )
    logits_of(model)
    for site in sites:
        (hidden, *args), kwargs = calls[site.module]
        if site.weight.ndim == 2 or not site.parameter.startswith("down"):
            with torch.no_grad():
                site.matrix(site.weight)[..., 0] = 0.0
                before = site.module(hidden, *args, **kwargs)
                moved = hidden.clone()
                moved[..., 0] += 1.0
                assert torch.equal(site.module(moved, *args, **kwargs), before), site.name
        else:
            bias = getattr(site.module, "down_proj_bias", None)
            with torch.no_grad():
                if bias is not None:
                    bias.zero_()
                site.matrix(site.weight)[..., 0, :] = 0.0  # the row that makes output 0
                out = site.module(hidden, *args, **kwargs)
            assert not bool(out[..., 0].any()), site.name
            assert bool(out[..., 1].any()), site.name


@some
def test_the_gradient_of_a_pruned_weight_is_that_of_its_effective_weight(architecture: str) -> None:
    model = tiny_model(architecture)
    site = sites_of(model)[-1]
    site.attach(None)
    site.mask.harden(site.weight.detach().abs(), nm(2, 4))
    site.mask.set_view(0.0)
    model(tokens()).logits.square().mean().backward()
    gradient = site.weight.grad
    assert gradient is not None
    assert bool((gradient[~site.mask.hard] != 0).any())
    site.mask.freeze(site.weight, nm(2, 4), site.name)
    site.weight.grad = None
    model(tokens()).logits.square().mean().backward()
    assert site.weight.grad is not None
    assert not bool((site.weight.grad[~site.mask.hard] != 0).any())


@every
def test_rules_that_are_missing_unmatched_or_overlap_are_errors_by_name(architecture: str) -> None:
    model = tiny_model(architecture)
    family = family_of(model.config.model_type)
    with pytest.raises(UnsupportedModel, match="rules ghost match no weight"):
        find_sites(model, dataclasses.replace(family, include=(*family.include, rule("ghost", "model.ghost.#.weight"))))
    twice = dataclasses.replace(family, exclude=(*family.exclude, dataclasses.replace(family.include[0], name="copy")))
    with pytest.raises(UnsupportedModel, match=rf"is claimed by {family.include[0].name} .* and copy "):
        find_sites(model, twice)
    with pytest.raises(PatternViolation, match="sites do not fit"):
        assign_patterns(sites_of(model), nm(3, 7))
    model.extra = torch.nn.Linear(4, 4)
    with pytest.raises(UnsupportedModel, match=r"no rule covers or excludes extra\.weight"):
        sites_of(model)


@some
def test_a_rule_in_the_wrong_orientation_is_an_error(architecture: str) -> None:
    model = tiny_model(architecture)
    family = family_of(model.config.model_type)
    turned = tuple(dataclasses.replace(rule, transposed=not rule.transposed) for rule in family.include)
    with pytest.raises(UnsupportedModel, match="groups would not run along its inputs"):
        find_sites(model, dataclasses.replace(family, include=turned))


def test_a_tied_weight_cannot_be_masked() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.up_proj.* and .*layers\.1\.mlp.* are one tied weight"):
        sites_of(model)


@pytest.mark.parametrize("architecture", ["deepseek_v3", "glm4_moe", "ernie4_5_moe"])
def test_the_correction_of_a_router_is_neither_masked_nor_lost(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    (name,) = [name for name in model.state_dict() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        model.state_dict()[name].copy_(torch.tensor([0.1, -0.2, 0.3, -0.4]))
    sites = sites_of(model)
    prune(sites, nm(2, 4))
    for site in sites:
        site.squash()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.state_dict()[name].flatten(), torch.tensor([0.1, -0.2, 0.3, -0.4]))
    assert torch.allclose(logits_of(loaded), logits_of(model), atol=1e-6)


def test_unknown_model_types_suggest_the_nearest_and_the_way_out() -> None:
    with pytest.raises(UnsupportedModel, match=r"Did you mean 'llama'.*family='automatic'"):
        family_of("lama")
