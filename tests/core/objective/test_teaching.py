"""Teachers of few entries: top-k, and samples whose mean is the full distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core import specs
from sparseforge_core.errors import RecipeError
from sparseforge_core.objective import Distill, Draws, Full, Sampled, TopK, forward_kl
from sparseforge_core.objective.divergence import SparseTarget

VOCABULARY = 13


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher logits in float64, `[5, 13]`."""
    student, teacher = 2.0 * torch.randn(
        2, 5, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return student, teacher


def kl_and_gradient(
    student: torch.Tensor, teacher: torch.Tensor | SparseTarget, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    student = student.clone().requires_grad_()
    kl = forward_kl(student, teacher, temperature)
    return kl.detach(), torch.autograd.grad(kl, student)[0]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 4.0))
def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(seed: int, temperature: float) -> None:
    student, teacher = pair(seed)
    full = kl_and_gradient(student, teacher, temperature)
    target = TopK(k=VOCABULARY).target(teacher, temperature, None)
    for ours, theirs in zip(kl_and_gradient(student, target, temperature), full, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_keeps_the_likeliest_entries_as_a_distribution(temperature: float) -> None:
    student, teacher = pair(0)
    target = TopK(k=3).target(teacher, temperature, None)
    assert isinstance(target, SparseTarget)
    probabilities = (teacher / temperature).softmax(-1)
    kept = probabilities.topk(3, dim=-1).values
    torch.testing.assert_close(target.weights, kept / kept.sum(-1, keepdim=True))
    assert float(forward_kl(student, target, temperature)) > 0.0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 4.0))
def test_the_mean_over_all_draws_is_the_full_divergence(seed: int, temperature: float) -> None:
    student, teacher = pair(seed)
    grid = 20_000  # every number of an even grid in turn: the mean of one draw without chance, to 1 / grid
    uniform = ((torch.arange(grid, dtype=torch.float64) + 0.5) / grid).view(grid, 1, 1).expand(grid, 5, 1)
    target = Sampled(n=1).target(teacher.expand(grid, -1, -1), temperature, uniform)
    drawn, gradient = kl_and_gradient(student.expand(grid, -1, -1), target, temperature)
    full, full_gradient = kl_and_gradient(student, teacher, temperature)
    assert float(drawn) == pytest.approx(float(full), rel=0.02, abs=0.01)
    torch.testing.assert_close(gradient.sum(0), full_gradient, rtol=0.0, atol=1e-3 * temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_are_unbiased_where_top_k_is_not(temperature: float) -> None:
    student, teacher = pair(1)
    full, full_gradient = kl_and_gradient(student, teacher, temperature)
    n, draws = 4, 5000
    uniform = torch.rand(draws, 5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = Sampled(n=n).target(teacher.expand(draws, -1, -1), temperature, uniform)
    drawn, gradient = kl_and_gradient(student.expand(draws, -1, -1), target, temperature)
    mean_gradient = gradient.sum(0)  # each draw's share of the mean over draws
    error = float((mean_gradient - full_gradient).norm() / full_gradient.norm())
    cut, cut_gradient = kl_and_gradient(student, TopK(k=n).target(teacher, temperature, None), temperature)
    bias = float((cut_gradient - full_gradient).norm() / full_gradient.norm())
    # 20,000 draws a position: a standard error below 1 %, where leaving out the tail costs several times that
    assert 3 * error < 0.06 < bias
    assert float(drawn) == pytest.approx(float(full), rel=0.05)
    assert abs(float(cut) - float(full)) > 0.06 * float(full)


def test_frequencies_of_the_draws_are_the_teachers_probabilities() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, -torch.inf, 1.0])
    uniform = Draws(seed=0, step=1).uniform(1, 1, 40_000)[0]
    target = Sampled(n=40_000).target(logits[None], 1.0, uniform)
    assert isinstance(target, SparseTarget)
    shares = torch.bincount(target.ids[0], minlength=5) / 40_000
    torch.testing.assert_close(shares, logits.softmax(-1), rtol=0.0, atol=0.01)
    assert int(torch.bincount(target.ids[0], minlength=5)[3]) == 0
    torch.testing.assert_close(target.log_teacher[0], logits.log_softmax(-1)[target.ids[0]])


def test_draws_depend_on_seed_step_and_row_and_not_on_micro_batches() -> None:
    whole = Draws(seed=3, step=7).uniform(4, 5, 2)
    parts = [Draws(seed=3, step=7, row=row).uniform(2, 5, 2) for row in (0, 2)]
    assert torch.equal(whole, torch.cat(parts))
    others = [
        Draws(seed=3, step=8).uniform(1, 5, 2)[0],
        Draws(seed=4, step=7).uniform(1, 5, 2)[0],
        *whole[1:],
    ]
    assert not any(torch.equal(whole[0], other) for other in others)
    before = torch.get_rng_state()
    Draws(seed=0, step=1).uniform(1, 2, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_taught_is_refused_by_field() -> None:
    with pytest.raises(RecipeError, match="k=0"):
        TopK(k=0)
    with pytest.raises(RecipeError, match="n=0"):
        Sampled(n=0)
    with pytest.raises(RecipeError, match="k=14: the vocabulary has 13 entries"):
        TopK(k=14).check(13)
    TopK(k=13).check(13)
    logits, tokens = torch.randn(1, 3, 7), torch.randint(0, 7, (1, 3))
    with pytest.raises(RecipeError, match=r"objective\.teacher_logits.*draws"):
        Distill(teacher_logits=Sampled()).losses(logits, logits, tokens)


def test_the_default_teaches_everything_and_leaves_old_keys() -> None:
    assert specs.encode(Distill()) == {"kind": "distill", "revision": 1}
    assert Distill().teacher_logits == Full()
    chosen = Distill(teacher_logits=Sampled(n=5), task_weight=1.0)
    assert specs.decode(specs.encode(chosen), Distill) == chosen
