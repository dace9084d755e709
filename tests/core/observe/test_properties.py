"""What holds of every estimator for any network, batch or scale."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseforge_core.observe.curvature import (
    Batch,
    Curvature,
    CurvatureAverage,
    Estimate,
    FiniteDifference,
    Fisher,
    GaussNewtonBartlett,
    Hutchinson,
    KFACDiagonal,
    MicroBatchFisher,
)
from tests.core.observe.known import TwoMatrices

SEEDS = st.integers(0, 2**31 - 1)
SCALES = st.floats(1e-3, 1e3)
SOME = settings(max_examples=15, deadline=None)

ALL: list[Curvature] = [
    Fisher(),
    MicroBatchFisher(),
    GaussNewtonBartlett(),
    KFACDiagonal(),
    *(cls(probes=2, signs=signs) for cls in (Hutchinson, FiniteDifference) for signs in ("before", "after", "mean")),
]


def observed(spec: Curvature, model: TwoMatrices, batch: Batch) -> Estimate:
    model.zero_grad()
    batch.loss(batch.tokens, batch.first).backward()  # what the step has done before it is observed
    estimate = spec.start(model.sites, seed=1)
    estimate.observe(batch)
    return estimate


@pytest.mark.parametrize("spec", ALL, ids=repr)
@SOME
@given(seed=SEEDS)
def test_curvature_is_never_negative(spec: Curvature, seed: int) -> None:
    model = TwoMatrices(seed)
    estimate = observed(spec, model, model.batch(sequences=3, length=3))
    assert all(bool((estimate.of(site) >= 0).all()) for site in model.sites)


@pytest.mark.parametrize(
    ("spec", "power"),
    [
        (Fisher(), 2),
        (MicroBatchFisher(sequences=2), 2),
        (GaussNewtonBartlett(), 0),  # its loss is its own
        (KFACDiagonal(), 0),
        (Hutchinson(probes=2), 1),
        (Hutchinson(probes=2, signs="before"), 1),
        (FiniteDifference(probes=2, signs="mean"), 1),
    ],
    ids=repr,
)
@SOME
@given(seed=SEEDS, scale=SCALES)
def test_a_loss_times_k_has_curvature_times_k_or_its_square(
    spec: Curvature, power: int, seed: int, scale: float
) -> None:
    model = TwoMatrices(seed)
    batch = model.batch(sequences=4, length=3)
    scaled = dataclasses.replace(batch, loss=lambda tokens, place: scale * model.loss(tokens))
    one, other = observed(spec, model, batch), observed(spec, model, scaled)
    for site in model.sites:
        expected = scale**power * one.of(site)
        assert torch.allclose(other.of(site), expected, rtol=1e-6, atol=1e-7 * float(expected.max()))


class Constant(CurvatureAverage):
    """An estimator that always finds the same."""

    def look(self, batch: Batch) -> dict[str, Tensor]:
        return {site.name: torch.full_like(site.weight, 3.0) for site in self.sites}


@SOME
@given(decay=st.floats(0.0, 0.999), count=st.integers(1, 40))
def test_the_average_of_a_constant_is_that_constant_from_the_first_observation_on(decay: float, count: int) -> None:
    model = TwoMatrices()
    average = Constant(model.sites, decay)
    for step in range(1, count + 1):
        average.observe(model.batch(step))
        assert torch.allclose(average.of(model.sites[0]), torch.tensor(3.0, dtype=torch.float64), rtol=1e-9)


@SOME
@given(decay=st.floats(0.0, 0.99), cut=st.integers(1, 9))
def test_an_average_goes_on_from_its_state(decay: float, cut: int) -> None:
    model = TwoMatrices()
    spec = GaussNewtonBartlett(every=2, decay=decay)
    whole, first, second = (spec.start(model.sites, seed=2) for _ in range(3))
    for step in range(1, 11):
        batch = model.batch(step, sequences=2, length=3)
        whole.observe(batch)
        if step == cut + 1:
            second.restore({key: x.clone() for key, x in first.state().items()})
        (first if step <= cut else second).observe(batch)
    assert all(torch.equal(whole.of(site), second.of(site)) for site in model.sites)


@SOME
@given(every=st.integers(1, 20), steps=st.integers(1, 60))
def test_the_first_step_and_every_k_th_are_observed(every: int, steps: int) -> None:
    model = TwoMatrices()
    average = Constant(model.sites, 0.9, every)
    for step in range(1, steps + 1):
        average.observe(model.batch(step))
    assert average.count == len({1, *range(every, steps + 1, every)})
