"""One-shot pruning whose masks come and go with their block: the same weights, never more than a block's masks."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from sparseforge_core.methods import ALPS, BESA, OWL, MagnitudePruning, Method, SparseGPT, Wanda
from sparseforge_core.methods.base import Surroundings
from sparseforge_core.models.sites import Site, assign_patterns
from sparseforge_core.sparsity.patterns import check_weight, nm
from tests.tiny import sites_of, tiny_model, tokens

METHODS: dict[str, Method] = {
    "wanda": Wanda(samples=4, length=16),
    "wanda-dense-inputs": Wanda(samples=4, length=16, sequential=False),
    "sparsegpt": SparseGPT(samples=4, length=16, width=16),
    "sparsegpt-sequential": SparseGPT(samples=4, length=16, width=16, true_sequential=True),
    "alps": ALPS(samples=4, length=16),
    "magnitude": MagnitudePruning(),
    "besa": BESA(samples=4, length=16, candidates=4),
    "owl": OWL(pruner=Wanda(samples=4, length=16), samples=4, length=16, spread=0.3),
}


def prune(model: Any, method: Method, *, passing: bool) -> list[Site]:
    sites = assign_patterns(sites_of(model), nm(2, 4))
    around = Surroundings(
        model=model, sites=sites, slorb=None, steps=0, calibration=lambda n, length: [tokens(n, length, seed=1)]
    )
    method.start(dataclasses.replace(around, passing=passing)).finish()
    return sites


@pytest.mark.parametrize("name", METHODS)
def test_the_weights_are_those_of_masks_that_stay(name: str) -> None:
    model = tiny_model("llama", layers=3)
    other = copy.deepcopy(model)
    prune(model, METHODS[name], passing=False)
    sites = prune(other, METHODS[name], passing=True)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for site in sites:
        check_weight(site.matrix(site.weight.detach()), site.pattern, site.name)
        assert not hasattr(site.module, "parametrizations")


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "besa", "magnitude"])
def test_no_more_than_one_block_carries_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", layers=3)
    masked: set[str] = set()
    most: list[int] = []
    attach, squash = Site.attach, Site.squash

    def attached(site: Site, *arguments: Any) -> Any:
        masked.add(site.name)
        most.append(len(masked))
        return attach(site, *arguments)

    def squashed(site: Site) -> Any:
        masked.discard(site.name)
        return squash(site)

    monkeypatch.setattr(Site, "attach", attached)
    monkeypatch.setattr(Site, "squash", squashed)
    sites = prune(model, METHODS[name], passing=True)
    assert max(most) == len(sites) // 3
    assert not masked
