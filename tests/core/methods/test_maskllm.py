"""MaskLLM's pieces worked by hand, and that what trains is the logits and nothing else."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods import MagnitudePruning, MaskLLM
from sparseforge_core.methods.base import Surroundings
from sparseforge_core.methods.maskllm import MaskLLMTrack
from sparseforge_core.methods.pattern_logits import (
    PatternLogits,
    Sampling,
    alike,
    keep_alive_gradient,
    patterns_of,
)
from sparseforge_core.models.sites import Site
from sparseforge_core.recorded import WARM, on_gpu
from sparseforge_core.schedules import Constant
from sparseforge_core.sparsity.patterns import BLOCK_16, GroupPattern, Pattern, nm
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
    assert torch.allclose(slope(law.logits), slope(logits))


def test_a_consistent_gradient_chooses_the_entries_that_lower_the_loss() -> None:
    layer = OneLayer(MaskLLM(prior=None), [[1.0, 1.0, 1.0, 1.0]], steps=60, weight_decay=0.0)
    for _ in range(60):
        layer.step([[1.0, -1.0, 1.0, -1.0]], rate=5e-3)
    assert layer.site.mask.hard.tolist() == [[False, True, False, True]]
    layer.track.finish()
    assert layer.model.weight.tolist() == [[0.0, 1.0, 0.0, 1.0]]
    assert layer.model.weight.requires_grad


@pytest.mark.parametrize(("keep", "size"), [(2, 4), (4, 8)])
def test_the_regularisation_in_closed_form_is_what_autograd_finds(keep: int, size: int) -> None:
    drawn = torch.Generator().manual_seed(0)
    patterns = patterns_of(size, keep).double()
    shape = (3, 5, len(patterns))
    logits = torch.randn(shape, generator=drawn, dtype=torch.float64).requires_grad_()
    noise = torch.randn(shape, generator=drawn, dtype=torch.float64)
    weights = torch.randn(3, 5, size, generator=drawn, dtype=torch.float64)
    at = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in (("temperature", 1.5), ("confidence", 3.0), ("strength", 0.1))
    }
    mask = torch.softmax((at["confidence"] * logits + noise) / at["temperature"], -1) @ patterns
    (-at["strength"] * (weights * mask).square().sum()).backward()
    found = keep_alive_gradient(logits.detach(), noise, weights, patterns, **at)
    assert torch.allclose(found, slope(logits), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pattern", [nm(2, 4), nm(4, 8)], ids=lambda pattern: pattern.name)
def test_a_compiled_forward_finds_the_mask_and_the_gradient_of_the_plain_one(pattern: Pattern) -> None:
    law = track_of([((4, 16), False, pattern)]).laws[0]
    found = []
    for way in (law, torch.compile(law, backend="aot_eager", fullgraph=True)):
        law.logits.grad = None
        effective = way(torch.arange(64.0).view(4, 16))
        effective.square().sum().backward()
        found.append((effective.detach(), slope(law.logits)))
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*found, strict=True))


SITES: list[tuple[tuple[int, ...], bool, Pattern]] = [
    ((4, 8), False, nm(2, 4)),
    ((2, 8), False, nm(4, 8)),
    ((8, 4), True, nm(2, 4)),
    ((3, 2, 16), False, nm(2, 4)),
    ((4, 8), False, nm(2, 4)),
    ((3, 16, 2), True, nm(2, 4)),
    ((4, 8), False, GroupPattern(rows=2, cols=2, keep=1)),
]
"""Shapes of weights, whether they are stored as [..., in, out], and their patterns."""


def slope(x: Tensor) -> Tensor:
    """The gradient that a tensor has."""
    assert x.grad is not None
    return x.grad


def track_of(sites: list[tuple[tuple[int, ...], bool, Pattern]], device: str = "cpu") -> MaskLLMTrack:
    """A track of sites with random weights, each with a gradient of zeros for its logits."""
    made = []
    drawn = torch.Generator().manual_seed(0)
    for place, (shape, transposed, pattern) in enumerate(sites):
        module = nn.Module()
        module.weight = nn.Parameter(torch.randn(shape, generator=drawn).to(device))
        made.append(Site(f"{place}.weight", module, "weight", transposed, "mlp", chosen=pattern))
    model = nn.ModuleList([site.module for site in made])
    method = MaskLLM(prior=None, keep_alive=Constant(value=0.5), confidence=Constant(value=10.0))
    track = method.start(Surroundings(model=model, sites=made, slorb=None, steps=9, calibration=lambda *_: []))
    assert isinstance(track, MaskLLMTrack)
    for law in track.laws:
        law.logits.grad = torch.zeros_like(law.logits)
    return track


def test_sites_worked_on_together_are_what_they_are_one_by_one() -> None:
    track = track_of(SITES)
    assert sorted(len(batch.laws) for batch in track.batches) == [1, 1, 2, 3]
    track.before_update(1)
    for site, law in zip(track.sites, track.laws, strict=True):
        (alone,) = torch.autograd.grad(-0.5 * (site.weight.detach() * law.sample()).square().sum(), [law.logits])
        assert torch.allclose(slope(law.logits), alone, atol=1e-6)
        assert bool(alone.any())
    before = [site.mask.hard.clone() for site in track.sites]
    with torch.no_grad():
        for law in track.laws[1::2]:
            law.logits.neg_()
    track.after_update(1, torch.optim.SGD([track.laws[0].logits]))
    for site, law in zip(track.sites, track.laws, strict=True):
        assert torch.equal(site.mask.hard, law.likeliest())
        assert torch.allclose(site.mask.mask, law.expected(), atol=1e-6)
    shares = [float((a != s.mask.hard).float().mean()) for a, s in zip(before, track.sites, strict=True)]
    assert [share > 0 for share in shares] == [False, True] * 3 + [False]
    assert track.flip_rate == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_recorded_work_is_the_plain_one(device: str) -> None:
    plain, recorded = track_of(SITES, device), track_of(SITES, device)
    recordings = 0

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        nonlocal recordings
        recordings += 1
        return on_gpu(work) if device == "cuda" else work

    recorded.record(capture)
    for step in range(1, WARM + 4):
        for track in (plain, recorded):
            for law in track.laws:
                slope(law.logits).zero_()
            track.before_update(step)
            with torch.no_grad():
                for law in track.laws:
                    law.logits.add_(slope(law.logits), alpha=-0.02)
            track.after_update(step, torch.optim.SGD([track.laws[0].logits]))
        assert recorded.flip_rate == plain.flip_rate > 0
        for ours, theirs in zip(recorded.laws, plain.laws, strict=True):
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-7)
        for site, other in zip(recorded.sites, plain.sites, strict=True):
            assert torch.equal(site.mask.hard, other.mask.hard)
            torch.testing.assert_close(site.mask.mask, other.mask.mask, rtol=1e-5, atol=1e-7)
    assert recordings == 2
    recorded.finish()


def test_no_more_logits_are_worked_on_at_once_than_allowed() -> None:
    laws = track_of(SITES).laws
    logits = laws[0].logits.numel()
    assert alike(laws) == [[0, 2, 4], [1], [3, 5], [6]]
    assert alike(laws, at_once=2 * logits) == [[0, 2], [4], [1], [3], [5], [6]]
    assert [len(places) for places in alike(laws, at_once=1)] == [1] * len(laws)


def test_a_site_that_no_token_reached_gets_the_regularisation_alone() -> None:
    reached, other = track_of(SITES[:1]), track_of(SITES[:1])
    other.laws[0].logits.grad = None
    reached.before_update(1)
    other.before_update(1)
    assert torch.equal(slope(reached.laws[0].logits), slope(other.laws[0].logits))


def test_noise_is_a_function_of_seed_and_step_and_each_site_has_its_own() -> None:
    track = track_of([SITES[0]] * 2)
    one, other = track.laws
    first = one.noise.clone()
    assert not torch.equal(first, other.noise)
    # Of its site alone: neither the others nor the steps before are in it.
    alone = torch.Generator().manual_seed(one.seed * 1_000_003 + 1)
    assert torch.equal(first, -torch.empty_like(first).exponential_(generator=alone).log())
    track.sampling.begin([other, one], 2, temperature=1.0, confidence=1.0)
    assert not torch.equal(first, one.noise)
    track.sampling.begin([other, one], 1, temperature=1.0, confidence=1.0)
    assert torch.equal(first, one.noise)


class _Counted(TorchDispatchMode):
    """Counts what the host starts: operations that are no mere views."""

    def __init__(self) -> None:
        super().__init__()
        self.started: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not op.is_view and op is not torch.ops.aten._unsafe_view.default:
            self.started[str(op)] += 1
        return op(*args, **(kwargs or {}))


def test_a_further_site_of_a_shape_costs_the_host_no_more_than_its_draw() -> None:
    counts: list[collections.Counter[str]] = []
    for count in (4, 8):
        track = track_of([SITES[0]] * count)
        with _Counted() as counted:
            track.before_update(1)
            track.after_update(1, torch.optim.SGD([track.laws[0].logits]))
        counts.append(counted.started)
    assert dict(counts[1] - counts[0]) == {"aten.exponential_.default": 4}


def test_what_it_cannot_learn_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"pattern block-16: a group of 256"):
        OneLayer(MaskLLM(prior=None), torch.ones(16, 16).tolist(), steps=4, pattern=BLOCK_16)
    with pytest.raises(RecipeError, match="prior: MaskLLM is no one-shot method"):
        MaskLLM(prior=MaskLLM())
    OneLayer(MaskLLM(prior=None), [[1.0] * 8], steps=4, pattern=nm(4, 8))
