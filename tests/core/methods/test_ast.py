"""AST on one group, each number worked from its update rule."""

from __future__ import annotations

import pytest
import torch

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods import AST
from sparseforge_core.schedules import Constant, Linear
from tests.core.methods.one_layer import OneLayer


def test_two_steps_worked_by_hand() -> None:
    """w = (4, 3, 2, 1): the first two are kept. g = (1, 0, 0, 1), lambda = 0.5, betas (0.5, 0.5), rate 0.1."""
    layer = OneLayer(AST(decay=Constant(value=0.5)), [[4.0, 3.0, 2.0, 1.0]], steps=10, betas=(0.5, 0.5), eps=1e-30)
    w = layer.step([[1.0, 0.0, 0.0, 1.0]], rate=0.1)
    # mu = (.5, 0, 0, .5); u = mu + .5 (0, 0, 2, 1) = (.5, 0, 1, 1); v = u^2 / 2; bias 1/2 for both:
    # the step is 0.1 (2 u) / sqrt(2 v) = 0.2 u / |u|.
    assert torch.allclose(w, torch.tensor([[3.8, 3.0, 1.8, 0.8]]))
    w = layer.step([[1.0, 0.0, 0.0, 1.0]], rate=0.1)
    # mu = (.75, 0, 0, .75): the decay of the first step left no trace in it. u = mu + .5 (0, 0, 1.8, .8)
    # = (.75, 0, .9, 1.15); v = v/2 + u^2/2 with v = (.125, 0, .5, .5); both biases 3/4.
    u = torch.tensor([0.75, 0.0, 0.9, 1.15])
    v = torch.tensor([0.125, 0.0, 0.5, 0.5]) / 2 + u**2 / 2
    want = torch.tensor([3.8, 3.0, 1.8, 0.8]) - 0.1 * (u / 0.75) / ((v / 0.75).sqrt() + 1e-30)
    assert torch.allclose(w[0], want)


def test_kept_weights_never_decay_and_the_decay_grows() -> None:
    layer = OneLayer(AST(decay=Linear(first=0.0, last=1.0, end=0.5)), [[4.0, -3.0, 2.0, -1.0]], steps=10)
    seen = []
    for _ in range(6):
        w = layer.step([[0.0, 0.0, 0.0, 0.0]], rate=1e-3)
        seen.append(layer.track.summary()["anneal/decay"])
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert w[0, :2].tolist() == [4.0, -3.0]
    assert 0 < w[0, 2] < 2.0
    assert -1.0 < w[0, 3] < 0


def test_the_mask_is_refreshed_every_ten_steps_only() -> None:
    layer = OneLayer(AST(), [[4.0, 3.0, 2.0, 1.0]], steps=40)
    with torch.no_grad():
        layer.site.weight[0, 3] = 10.0
    masks = []
    for _ in range(10):
        layer.step([[0.0, 0.0, 0.0, 0.0]], rate=0.0)
        masks.append(layer.site.mask.hard[0].tolist())
    assert masks[:9] == [[True, True, False, False]] * 9
    assert masks[9] == [True, False, False, True]
    assert layer.model.weight[0].tolist() == [4.0, 0.0, 0.0, 10.0]


def test_bad_values_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="refresh_every=0"):
        AST(refresh_every=0)
    with pytest.raises(RecipeError, match="decay"):
        AST(decay=Constant(value=-1.0))
