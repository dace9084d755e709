"""Annealing that begins at a one-shot solution: its mask and weights, the dense weights waiting behind the mask."""

from __future__ import annotations

import pytest
import torch

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods import FrozenMask, SparseForge, SparseGPT
from sparseforge_core.methods.base import Surroundings
from sparseforge_core.methods.one_shot import one_shot_solution
from sparseforge_core.models.sites import assign_patterns
from sparseforge_core.sparsity.patterns import nm
from tests.tiny import sites_of, tiny_model, tokens

PRIOR = SparseGPT(samples=4, length=16)


def _around() -> Surroundings:
    model = tiny_model("llama")
    sites = assign_patterns(sites_of(model), nm(2, 4))
    return Surroundings(
        model=model, sites=sites, slorb=None, steps=20, calibration=lambda n, length: [tokens(n, 16, seed=1)]
    )


def test_the_solution_is_the_methods_and_the_model_stays_dense() -> None:
    around, alone = _around(), _around()
    dense = {name: p.detach().clone() for name, p in around.model.named_parameters()}
    found = one_shot_solution(PRIOR, around)
    for name, parameter in around.model.named_parameters():
        assert torch.equal(parameter, dense[name])
    PRIOR.start(alone).finish()
    for site in alone.sites:
        solution = found[site.name]
        assert torch.equal(site.weight, torch.where(solution.hard, solution.weight, 0.0))


@pytest.mark.parametrize("storage", ["float32", "int16"])
def test_the_first_forward_is_that_of_the_one_shot_model(storage: str) -> None:
    around, alone = _around(), _around()
    dense = {site.name: site.weight.detach().clone() for site in around.sites}
    SparseForge(start_from=PRIOR, mask_storage=storage).start(around)  # type: ignore[arg-type]
    PRIOR.start(alone).finish()
    ids = tokens(2, 16, seed=3)
    torch.testing.assert_close(around.model(input_ids=ids).logits, alone.model(input_ids=ids).logits)
    for site in around.sites:
        assert torch.equal(site.weight[~site.mask.hard], dense[site.name][~site.mask.hard])


@pytest.mark.parametrize("prior", [FrozenMask(), SparseForge()])
def test_only_a_one_shot_method_can_be_started_from(prior: FrozenMask | SparseForge) -> None:
    with pytest.raises(RecipeError, match="start_from"):
        SparseForge(start_from=prior)
