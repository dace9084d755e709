"""MaskLLM's pieces worked by hand, and that what trains is the logits and nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods import MagnitudePruning, MaskLLM
from sparseforge_core.methods.maskllm import (
    MaskLLMTrack,
    PatternLogits,
    Sampling,
    alike,
    keep_alive_gradient,
    patterns_of,
)
from sparseforge_core.schedules import Constant
from sparseforge_core.sparsity.patterns import BLOCK_16, nm
from tests.core.methods.one_layer import OneLayer


def law_of(layer: OneLayer) -> PatternLogits:
    law = layer.site.mask.law
    assert isinstance(law, PatternLogits)
    return law


def test_the_patterns_are_all_ways_to_keep_n_of_m() -> None:
    assert patterns_of(4, 2).tolist() == [
        [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1],
    ]  # fmt: skip
    assert patterns_of(8, 4).shape == (70, 8)
    assert bool((patterns_of(8, 4).sum(-1) == 4).all())


def test_the_expected_mask_is_the_softmax_of_the_logits_times_the_patterns() -> None:
    layer = OneLayer(MaskLLM(prior=None, temperature=Constant(value=2.0)), [[4.0, 3.0, 2.0, 1.0]], steps=4)
    law = law_of(layer)
    law.confidence.fill_(4.0)
    with torch.no_grad():
        law.logits.copy_(torch.tensor([[math.log(2) / 2, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    # kappa p / tau = ln 2 for the first pattern: y = (2, 1, 1, 1, 1, 1) / 7; entries 0 and 1 are in it and two others.
    assert torch.allclose(law.expected(), torch.tensor([[4.0, 4.0, 3.0, 3.0]]) / 7)
    assert law.likeliest().tolist() == [[True, True, False, False]]
    assert torch.allclose(law.sample().sum(), torch.tensor(2.0))


def test_the_prior_gives_each_shared_entry_three_standard_deviations() -> None:
    layer = OneLayer(MaskLLM(prior=None), [[4.0, 3.0, 2.0, 1.0]], steps=4)
    law = law_of(layer)
    before, spread = law.logits.detach().clone(), float(law.logits.detach().std())
    law.favour(torch.tensor([[True, True, False, False]]), 3.0)
    gained = (law.logits.detach() - before)[0] / spread
    # overlaps of (1,1,0,0) with the six patterns are 2, 1, 1, 1, 1, 0, less 1 on average
    assert torch.allclose(gained, torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0, -3.0]), atol=1e-4)
    primed = OneLayer(MaskLLM(prior=MagnitudePruning()), [[1.0, 3.0, -2.0, 4.0]] * 16, steps=4)
    assert primed.site.mask.hard.float().mean(0).tolist()[1] > 0.8
    assert primed.site.weight[0].tolist() == [1.0, 3.0, -2.0, 4.0]


def test_samples_are_functions_of_the_step_and_only_logits_train() -> None:
    layer = OneLayer(MaskLLM(prior=None), [[4.0, 3.0, 2.0, 1.0]], steps=4)
    law, track = law_of(layer), layer.track
    assert isinstance(track, MaskLLMTrack)
    first = law.sample()
    assert torch.equal(first, law.sample())
    at = {"temperature": float(law.temperature), "confidence": float(law.confidence)}
    track.sampling.begin([law], 2, **at)
    assert not torch.equal(first, law.sample())
    track.sampling.begin([law], 1, **at)
    assert torch.equal(first, law.sample())
    trained = [name for name, parameter in layer.model.named_parameters() if parameter.requires_grad]
    assert trained == ["parametrizations.weight.0.law.logits"]
    assert [group["rate_scale"] for group in layer.optimizer.param_groups] == [10.0]
    layer.step([[0.1, 0.1, -0.1, 0.1]], rate=1e-3)
    assert layer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)
    assert layer.site.weight.tolist() == [[4.0, 3.0, 2.0, 1.0]]


def test_the_regularisation_is_the_gradient_of_the_kept_weights_energy() -> None:
    method = MaskLLM(prior=None, keep_alive=Constant(value=0.5), temperature=Constant(value=1.0))
    layer = OneLayer(method, [[4.0, 3.0, 2.0, 1.0]], steps=4)
    law = law_of(layer)
    law.confidence.fill_(1.0)
    layer.track.before_update(1)
    logits = law.logits.detach().clone().requires_grad_()
    noise = torch.empty_like(logits).exponential_(generator=Sampling(torch.device("cpu")).stream(law.seed, 1))
    mask = torch.softmax(logits - noise.log(), -1) @ patterns_of(4, 2)
    (-0.5 * (torch.tensor([[4.0, 3.0, 2.0, 1.0]]) * mask).square().sum()).backward()
    assert torch.allclose(law.logits.grad, logits.grad)  # type: ignore[arg-type]


def test_a_consistent_gradient_chooses_the_entries_that_lower_the_loss() -> None:
    layer = OneLayer(MaskLLM(prior=None), [[1.0, 1.0, 1.0, 1.0]], steps=60, weight_decay=0.0)
    for _ in range(60):
        layer.step([[1.0, -1.0, 1.0, -1.0]], rate=5e-3)
    assert layer.site.mask.hard.tolist() == [[False, True, False, True]]
    layer.track.finish()
    assert layer.model.weight.tolist() == [[0.0, 1.0, 0.0, 1.0]]
    assert layer.model.weight.requires_grad


def test_what_it_cannot_learn_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"pattern block-16: a group of 256"):
        OneLayer(MaskLLM(prior=None), torch.ones(16, 16).tolist(), steps=4, pattern=BLOCK_16)
    with pytest.raises(RecipeError, match="prior: MaskLLM is no one-shot method"):
        MaskLLM(prior=MaskLLM())
    OneLayer(MaskLLM(prior=None), [[1.0] * 8], steps=4, pattern=nm(4, 8))
