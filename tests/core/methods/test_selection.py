"""Masks by magnitude, selected for many sites together, and what is said of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseforge_core.errors import PatternViolation
from sparseforge_core.methods import SRSTE, FrozenMask
from sparseforge_core.methods import shards as batches
from sparseforge_core.methods.base import MaskedTrack, Surroundings
from sparseforge_core.methods.magnitude import MagnitudeTrack
from sparseforge_core.models.sites import Site
from sparseforge_core.sparsity.patterns import BLOCK_16, Pattern, Unstructured, nm, top_mask
from sparseforge_core.sparsity.report import mask_summary
from tests.core.methods.one_layer import OneLayer

SHAPES: list[tuple[tuple[int, int], bool, Pattern]] = [
    ((16, 32), False, nm(2, 4)),
    ((32, 16), True, nm(2, 4)),
    ((48, 32), False, BLOCK_16),
    ((8, 24), False, nm(4, 8)),
    ((8, 24), False, Unstructured(density=0.5)),
    ((16, 32), False, nm(2, 4)),
]
"""Stored shapes, whether they are `[in, out]`, and patterns: some go together, some do not."""


def tracks() -> MagnitudeTrack:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(shape[1], shape[0], bias=False) for shape, _, _ in SHAPES)
    sites = [
        Site(f"{i}.weight", layer, "weight", transposed, "mlp", chosen=pattern)
        for i, (layer, (_, transposed, pattern)) in enumerate(zip(layers, SHAPES, strict=True))
    ]
    around = Surroundings(model=layers, sites=sites, slorb=None, steps=4, calibration=lambda *_: [])
    track = SRSTE().start(around)
    assert isinstance(track, MagnitudeTrack)
    return track


@pytest.mark.parametrize("most", [1, 1000, 2**27])
def test_every_site_gets_the_mask_that_it_would_get_alone(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST", most)
    track = tracks()
    before = [site.mask.hard.clone() for site in track.sites]
    with torch.no_grad():
        for site in track.sites:
            site.weight.copy_(torch.randn_like(site.weight))
    track.select()
    track.show()
    flipped = []
    for site, old in zip(track.sites, before, strict=True):
        hard = site.matrix(top_mask(site.matrix(site.weight.detach().abs()), site.pattern))
        assert torch.equal(site.mask.hard, hard)
        assert torch.equal(site.mask.mask, hard.float())
        assert torch.equal(site.mask.view, hard.float())
        flipped.append(float((hard != old).double().mean()))
    assert track.flip_rate == pytest.approx(sum(flipped) / len(flipped), rel=1e-12)
    assert track.flip_rate > 0.2


def test_a_weight_that_is_not_finite_is_refused_by_its_site() -> None:
    track = tracks()
    with torch.no_grad():
        track.sites[5].weight[0, 0] = torch.nan
    with pytest.raises(PatternViolation, match=r"site 5\.weight: a score is not finite"):
        track.select()


def test_a_frozen_mask_is_summarised_without_a_look() -> None:
    track = OneLayer(FrozenMask(), [[4.0, 3.0, 2.0, 1.0]], steps=4).track
    assert isinstance(track, MaskedTrack)
    looked = mask_summary((site.mask.mask, site.mask.hard) for site in track.sites)
    assert track.summary() == {**looked, "mask/flip_rate": 0.0}
