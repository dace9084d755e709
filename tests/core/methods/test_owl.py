"""OWL's allocation worked by hand, and the densities that it leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods import OWL, MagnitudePruning, MaskLLM, SparseGPT, Wanda
from sparseforge_core.methods.owl import offsets_of, outlier_share
from sparseforge_core.observe.blocks import stream_blocks
from sparseforge_core.sparsity.allocation import allocate
from sparseforge_core.sparsity.patterns import Unstructured, check_mask, nm
from tests.core.methods.test_sparsegpt import around_of
from tests.tiny import sites_of, tiny_model, tokens


def test_densities_follow_the_shares_of_outliers_by_hand() -> None:
    """Shares 1, 2 and 3 % with spread 0.1: 0, 0.1 and 0.2, so densities 0.4, 0.5 and 0.6."""
    offsets = offsets_of([0.01, 0.02, 0.03], 0.1)
    assert offsets == pytest.approx([0.0, 0.1, 0.2])
    assert offsets_of([0.01, 0.01], 0.1) == [0.0, 0.0]
    found = allocate(Unstructured(density=0.5), [0.5 + offset for offset in offsets], [100, 100, 100])
    assert [pattern.density for pattern in found] == pytest.approx([0.4, 0.5, 0.6])


def test_whole_keep_counts_by_hand() -> None:
    """Of 8: 3.2, 4 and 4.8 round down to 3, 4, 4; the one that is left of 12 goes to the third."""
    assert [p.name for p in allocate(nm(4, 8), [0.4, 0.5, 0.6], [8, 8, 8])] == ["3:8", "4:8", "5:8"]
    assert [p.name for p in allocate(nm(2, 4), [0.1, 0.9], [4, 4])] == ["1:4", "3:4"]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(1, 50)), min_size=1, max_size=12),
    st.sampled_from([nm(2, 4), nm(4, 8), nm(1, 4), nm(3, 4)]),
)
def test_the_budget_is_kept_and_nearly_spent(asked: list[tuple[float, int]], pattern: object) -> None:
    wanted, sizes = zip(*asked, strict=True)
    found = allocate(pattern, wanted, sizes)  # type: ignore[arg-type]
    budget = pattern.keep * sum(sizes)  # type: ignore[attr-defined]
    spent = sum(p.keep * size for p, size in zip(found, sizes, strict=True))  # type: ignore[attr-defined]
    assert spent <= budget
    assert budget - spent < max(sizes)
    assert all(1 <= p.keep < p.cols for p in found)  # type: ignore[attr-defined]
    if len(set(sizes)) == 1:
        assert spent == budget


def test_the_share_of_outliers_is_counted_over_a_block() -> None:
    model = tiny_model("llama")
    block = next(stream_blocks(model, sites_of(model), [tokens(4, 16)]))
    norms = block.input_norms()
    scores = torch.cat([(site.weight.abs() * norms[site.name]).flatten() for site in block.sites])
    assert outlier_share(block, 3.0) == pytest.approx(float((scores > 3 * scores.mean()).float().mean()), abs=1e-5)


@pytest.mark.parametrize("pruner", [MagnitudePruning(), Wanda(samples=8), SparseGPT(samples=8)])
@pytest.mark.parametrize("pattern", [nm(4, 8), Unstructured(density=0.5)])
def test_blocks_end_with_their_own_density_and_the_model_with_the_recipes(pruner: object, pattern: object) -> None:
    model = tiny_model("llama", layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:4] *= 8.0  # outliers in the second block
    method = OWL(pruner=pruner, spread=0.2, samples=8)  # type: ignore[arg-type]
    track = method.start(around_of(model, pattern))
    for site in track.sites:
        check_mask(site.mask.hard, site.pattern, site.name)
    densities = [float(site.mask.hard.float().mean()) for site in track.sites]
    assert max(densities) - min(densities) > 0.2
    assert max(densities) == pytest.approx(densities[7], abs=0.01)  # rows round to whole entries
    kept = sum(int(site.mask.hard.sum()) for site in track.sites)
    assert kept / sum(site.weight.numel() for site in track.sites) == pytest.approx(0.5, abs=0.01)
    found = track.findings()
    assert found["density"] == pytest.approx(0.5, abs=1e-6)
    assert found["density_least"] < 0.5 < found["density_most"]


def test_what_it_cannot_steer_is_refused() -> None:
    with pytest.raises(RecipeError, match="pruner: MaskLLM"):
        OWL(pruner=MaskLLM())
    with pytest.raises(RecipeError, match=r"spread=0\.5"):
        OWL(spread=0.5)
    with pytest.raises(RecipeError, match="smaller spread"):
        allocate(Unstructured(density=0.1), [0.1, 0.9], [1, 1])
