"""The contract of every family: nothing unaccounted, nothing changed at mask = 1, exact and loadable after export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from sparseforge_core.errors import PatternViolation, UnsupportedModel
from sparseforge_core.models.families import FAMILIES, family_of
from sparseforge_core.models.families.base import rule
from sparseforge_core.models.sites import assign_patterns, coverage, find_sites
from sparseforge_core.sparsity.patterns import BLOCK_16, check_weight, nm
from sparseforge_core.sparsity.slorb import SLoRB
from tests.tiny import ARCHITECTURES, sites_of, tiny_model, tokens

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def test_every_matrix_is_covered_or_excluded_by_a_named_rule(architecture: str) -> None:
    model = tiny_model(architecture)
    cover = coverage(model, family_of(model.config.model_type))
    assert cover.masked + sum(cover.excluded.values()) == cover.total == sum(p.numel() for p in model.parameters())
    assert cover.masked == sum(site.weight.numel() for site in sites_of(model))
    assert cover.share > 0.7


def test_logits_do_not_change_when_masks_of_ones_are_attached(architecture: str) -> None:
    model = tiny_model(architecture)
    before = model(tokens()).logits
    keys = sorted(model.state_dict())
    sites = sites_of(model)
    for site in sites:
        site.attach(SLoRB(k=4))
    assert torch.equal(model(tokens()).logits, before)
    for site in sites:
        site.mask.set_view(1.0)
        site.squash()
    assert torch.equal(model(tokens()).logits, before)
    assert sorted(model.state_dict()) == keys


@pytest.mark.parametrize("pattern", [nm(2, 4), BLOCK_16], ids=lambda p: p.name)
def test_the_pruned_model_is_exact_and_survives_a_round_trip(
    architecture: str, pattern: object, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    sites = sites_of(model)
    assign_patterns(sites, pattern)
    for site in sites:
        site.attach(None)
        site.mask.harden(site.weight.detach().abs(), pattern)
        site.mask.freeze(site.weight, pattern, site.name)
    masked = model(tokens()).logits
    for site in sites:
        site.squash()
        check_weight(site.matrix(site.weight), pattern, site.name)
        assert not bool((site.weight == 0).logical_and(torch.signbit(site.weight)).any()), "a pruned weight is -0"
    assert torch.equal(model(tokens()).logits, masked)
    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.allclose(loaded(tokens()).logits, masked, atol=1e-6)
    for site in find_sites(loaded, family_of(loaded.config.model_type)):
        check_weight(site.matrix(site.weight), pattern, site.name)


def test_the_gradient_of_a_pruned_weight_is_that_of_its_effective_weight(architecture: str) -> None:
    model = tiny_model(architecture)
    site = sites_of(model)[0]
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


def test_a_weight_that_no_rule_claims_is_an_error(architecture: str) -> None:
    model = tiny_model(architecture)
    model.extra = torch.nn.Linear(4, 4)
    with pytest.raises(UnsupportedModel, match=r"no rule covers or excludes extra\.weight"):
        sites_of(model)


def test_a_required_rule_that_matches_nothing_and_a_double_claim_are_errors(architecture: str) -> None:
    import dataclasses

    model = tiny_model(architecture)
    family = family_of(model.config.model_type)
    ghost = dataclasses.replace(family, include=(*family.include, rule("ghost", "model.ghost.#.weight")))
    with pytest.raises(UnsupportedModel, match="rules ghost match no weight"):
        find_sites(model, ghost)
    twice = dataclasses.replace(family, exclude=(*family.exclude, family.include[0]))
    with pytest.raises(UnsupportedModel, match="is claimed by"):
        find_sites(model, twice)


def test_a_pattern_that_does_not_divide_is_refused_by_site(architecture: str) -> None:
    with pytest.raises(PatternViolation, match="sites do not fit"):
        assign_patterns(sites_of(tiny_model(architecture)), nm(3, 7))


def test_unknown_model_types_suggest_the_nearest(architecture: str) -> None:
    with pytest.raises(UnsupportedModel, match="Did you mean 'llama'"):
        family_of("lama")
    assert len(FAMILIES) >= len(ARCHITECTURES)
