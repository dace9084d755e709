"""ProxSparse's regulariser and its proximal map, against a search, and the mask that comes of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods import ProxSparse
from sparseforge_core.methods.proxsparse import proximal, regulariser
from sparseforge_core.sparsity.patterns import nm
from tests.core.methods.one_layer import OneLayer


def test_the_regulariser_is_zero_exactly_at_two_of_four() -> None:
    groups = torch.tensor([[1.0, -2.0, 0.0, 0.0], [1.0, -2.0, 3.0, 0.0], [1.0, -2.0, 3.0, -4.0]])
    assert regulariser(groups).tolist() == [0.0, 6.0, 6.0 + 8.0 + 12.0 + 24.0]


def test_three_cases_worked_by_hand() -> None:
    """y = (3, 2, 1, 0): z = (3, 2, 0, 0) costs 1/2. With weight 1/20 three entries cost less than that; with 1 not."""
    strong = proximal(torch.tensor([[3.0, -2.0, 1.0, 0.0]]), 1.0)
    assert torch.allclose(strong, torch.tensor([[3.0, -2.0, 0.0, 0.0]]))
    weak = proximal(torch.tensor([[3.0, -2.0, 1.0, 0.0]]), 0.05)[0]
    a, b, c = weak[0], weak[1].abs(), weak[2]
    # stationarity of 1/2 ||z - y||^2 + abc / 20
    assert torch.allclose(torch.stack([a + b * c / 20, b + a * c / 20, c + a * b / 20]), torch.tensor([3.0, 2.0, 1.0]))
    assert torch.equal(proximal(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 0.0), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.0, 2.0), min_size=4, max_size=4), st.sampled_from([0.01, 0.1, 0.5, 2.0]))
def test_no_point_of_a_grid_is_better(entries: list[float], weight: float) -> None:
    y = torch.tensor(entries)

    def cost(z: torch.Tensor) -> torch.Tensor:
        return 0.5 * (z - y).square().sum(-1) + weight * regulariser(z)

    shares = torch.tensor(list(itertools.product((0.0, 0.25, 0.5, 0.75, 0.9, 1.0), repeat=4)))
    assert float(cost(proximal(y.unsqueeze(0), weight, sweeps=40))[0]) <= float(cost(shares * y).min()) + 1e-4


def test_the_mask_goes_onto_the_original_weights() -> None:
    weight = [[1.0, 0.8, 0.9, 0.2]]
    layer = OneLayer(ProxSparse(strength=5.0), weight, steps=40)
    for _ in range(40):
        layer.step([[0.0, -1.0, 1.0, 0.0]], rate=0.02)
    assert layer.track.summary()["mask/settled"] == 1.0
    layer.track.finish()
    assert layer.model.weight.tolist() == [[1.0, pytest.approx(0.8), 0.0, 0.0]]


def test_the_anchor_is_the_gradient_of_its_term() -> None:
    layer = OneLayer(ProxSparse(anchor=0.7, anchor_eps=0.1), [[1.0, -0.8, 0.5, 0.0]], steps=4)
    w = torch.tensor([[0.6, -0.8, 0.1, 0.3]], requires_grad=True)
    original = torch.tensor([[1.0, -0.8, 0.5, 0.0]])
    d = (original + 0.1 * original.sign())[:, :3]
    (w[:, :3] * (w - original)[:, :3] / d).square().sum().backward()
    found = layer.track._anchor_gradient(w.detach(), original)
    assert torch.allclose(found, w.grad)  # type: ignore[arg-type]
    assert found[0, 1] == 0.0
    assert found[0, 0] != 0.0


def test_other_patterns_and_bad_values_are_refused() -> None:
    with pytest.raises(RecipeError, match="pattern 4:8: ProxSparse"):
        OneLayer(ProxSparse(), [[1.0] * 8], steps=4, pattern=nm(4, 8))
    with pytest.raises(RecipeError, match="strength=0"):
        ProxSparse(strength=0.0)
