"""CAST on one group, each number worked from AdamS."""

from __future__ import annotations

import pytest
import torch

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods import CAST
from tests.core.methods.one_layer import OneLayer


def test_two_steps_worked_by_hand() -> None:
    """w = (4, -3, 2, -1), the first two kept; g = (1, 0, 1, 0), lambda = 2, T = 4, betas (0.5, 0.5), rate 0.1."""
    method = CAST(pressure=2.0, scale_blocks=0)
    layer = OneLayer(method, [[4.0, -3.0, 2.0, -1.0]], steps=4, betas=(0.5, 0.5), eps=1e-30)
    w = layer.step([[1.0, 0.0, 1.0, 0.0]], rate=0.1)
    # mu = (.5, 0, .5, 0); a = 1/4: mu~ = (.5, 0, .75 * .5 + .25 * 2, -.25 * 2) = (.5, 0, .875, -.5);
    # v = mu~^2 / 2; the step is 0.1 (2 mu~) / sqrt(2 v) = 0.2 sign(mu~).
    assert torch.allclose(w, torch.tensor([[3.8, -3.0, 1.8, -0.8]]))
    w = layer.step([[1.0, 0.0, 1.0, 0.0]], rate=0.1)
    # mu = (.75, 0, .75, 0): no trace of the pressure; a = 1/2: mu~ = (.75, 0, .375 + 1, -1).
    u = torch.tensor([0.75, 0.0, 1.375, -1.0])
    v = torch.tensor([0.5, 0.0, 0.875, 0.5]) ** 2 / 4 + u**2 / 2
    want = torch.tensor([3.8, -3.0, 1.8, -0.8]) - 0.1 * (u / 0.75) / ((v / 0.75).sqrt() + 1e-30)
    assert torch.allclose(w[0], want)


def test_the_forward_is_dense_and_scaled_by_blocks_until_the_end() -> None:
    layer = OneLayer(CAST(), [[4.0, -3.0, 2.0, -1.0, 1.0, 2.0, 3.0, 4.0]], steps=10)
    assert torch.equal(layer.model.weight, layer.site.weight)
    names = [name for name, parameter in layer.model.named_parameters() if parameter.requires_grad]
    assert names == ["parametrizations.weight.original", "parametrizations.weight.0.law.scale"]
    layer.step([[1.0] * 8], rate=0.1)
    scale = layer.site.mask.law.scale
    # d loss / d A = sum of g W over the block: 2 and 10, so Adam's first step is -0.1 for both.
    assert torch.allclose(scale, torch.full((1, 2), 0.9))
    with torch.no_grad():
        scale.copy_(torch.tensor([[0.5, 2.0]]))
        layer.site.weight.copy_(torch.tensor([[4.0, -3.0, 2.0, -1.0, 1.0, 2.0, 3.0, 4.0]]))
    assert torch.allclose(layer.model.weight[0], torch.tensor([2.0, -1.5, 1.0, -0.5, 2.0, 4.0, 6.0, 8.0]))
    assert layer.track.summary()["mask/residual"] == pytest.approx(6 / 20)
    assert layer.track.finish() == {}
    assert layer.model.weight[0].tolist() == [2.0, -1.5, 0.0, 0.0, 0.0, 0.0, 6.0, 8.0]
    assert [name for name, _ in layer.model.named_parameters()] == ["weight"]


def test_pressure_drives_masked_out_entries_to_the_size_of_the_learning_rate() -> None:
    layer = OneLayer(CAST(pressure=1e-3, scale_blocks=0), [[1.0, -0.9, 0.05, -0.04]], steps=200)
    for step in range(200):
        w = layer.step([[0.0, 0.0, 0.0, 0.0]], rate=1e-3 * (1 - step / 200))
    assert w[0, :2].tolist() == pytest.approx([1.0, -0.9])
    assert float(w[0, 2:].abs().max()) < 2e-3


def test_bad_values_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="pressure=-1"):
        CAST(pressure=-1.0)
    with pytest.raises(RecipeError, match=r"scale_blocks=3: site weight has 4 inputs"):
        OneLayer(CAST(scale_blocks=3), [[4.0, 3.0, 2.0, 1.0]], steps=4)
