"""The objective against its formula, its properties and its derivatives, with its inputs untouched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core.errors import DataError, RecipeError
from sparseforge_core.objective import Distill, Objective, TaskOnly, Then, forward_kl, next_token_loss
from sparseforge_core.specs import decode, encode
from tests.tiny import tiny_source


def test_cross_entropy_predicts_the_next_token() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    probabilities = logits.double().softmax(-1)
    picked = [float(probabilities[b, t, tokens[b, t + 1]].log()) for b in range(2) for t in range(4)]
    assert float(next_token_loss(logits, tokens)) == pytest.approx(-sum(picked) / 8, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_forward_kl_equals_the_naive_formula_and_leaves_its_inputs(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 9), torch.randn(3, 4, 9)
    copies = student.clone(), teacher.clone()
    p = (teacher.double() / temperature).softmax(-1)
    q = (student.double() / temperature).softmax(-1)
    naive = temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    assert float(forward_kl(student, teacher, temperature)) == pytest.approx(float(naive), rel=1e-5)
    assert torch.equal(student, copies[0])
    assert torch.equal(teacher, copies[1])


def test_weights_mix_the_two_and_equal_logits_have_no_divergence() -> None:
    logits, tokens = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    losses = Distill(kl_weight=0.25).losses(logits, logits.clone(), tokens)
    assert losses.kl is not None
    assert float(losses.kl) == pytest.approx(0.0, abs=1e-6)
    assert float(losses.total) == pytest.approx(0.75 * float(losses.task), rel=1e-6)
    assert TaskOnly().losses(logits, None, tokens).kl is None


def test_bad_objectives_are_refused_by_field() -> None:
    with pytest.raises(RecipeError, match=r"kl_weight=1\.5"):
        Distill(kl_weight=1.5)
    with pytest.raises(RecipeError, match="temperature=0"):
        Distill(temperature=0.0)
    logits, tokens = torch.randn(1, 3, 7), torch.randint(0, 7, (1, 3))
    with pytest.raises(DataError, match="vocabulary has 8 entries"):
        Distill().losses(logits, torch.randn(1, 3, 8), tokens)
    with pytest.raises(RecipeError, match="without teacher logits"):
        Distill().losses(logits, None, tokens)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.5), (0.33, 0.67), (0.0, 1.0), (2.5, 0.0)])
def test_a_plain_sum_has_the_weights_it_names(weights: tuple[float, float]) -> None:
    torch.manual_seed(0)
    logits, taught, tokens = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    losses = Distill(task_weight=weights[0], kl_weight=weights[1], temperature=2.0).losses(logits, taught, tokens)
    expected = weights[0] * next_token_loss(logits, tokens) + weights[1] * forward_kl(
        logits[:, :-1], taught[:, :-1], 2.0
    )
    assert float(losses.total) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kl_weight": -0.1}, r"kl_weight=-0\.1"),
        ({"kl_weight": math.nan}, "kl_weight=nan"),
        ({"kl_weight": math.inf, "task_weight": 1.0}, "kl_weight=inf"),
        ({"task_weight": -1.0}, r"task_weight=-1\.0"),
        ({"task_weight": 0.0, "kl_weight": 0.0}, "nothing is minimised"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": math.nan}, "temperature=nan"),
    ],
)
def test_weights_and_temperature_out_of_range_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        Distill(**changes)


SEEDS = st.integers(0, 2**31)
TEMPERATURES = st.floats(0.25, 8.0)


def pair(seed: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher logits in float64, `[3, 11]`."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 11, generator=generator, dtype=torch.float64) * spread
    return student, teacher


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, temperature=TEMPERATURES, spread=st.floats(0.01, 30.0))
def test_kl_is_never_negative_and_zero_at_equality_alone(seed: int, temperature: float, spread: float) -> None:
    student, teacher = pair(seed, spread)
    assert float(forward_kl(student, teacher, temperature)) > 0.0
    assert abs(float(forward_kl(student, student.clone(), temperature))) < 1e-12
    loss = forward_kl(student.requires_grad_(), student.detach().clone(), temperature)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(gradient.abs().max()) < 1e-12


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, temperature=TEMPERATURES)
def test_kl_at_t_is_t_squared_times_that_of_logits_divided_by_t(seed: int, temperature: float) -> None:
    student, teacher = pair(seed, 3.0)
    plain = forward_kl(student / temperature, teacher / temperature, 1.0)
    assert float(forward_kl(student, teacher, temperature)) == pytest.approx(temperature**2 * float(plain), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, temperature=TEMPERATURES, shift=st.floats(-50.0, 50.0), other=st.floats(-50.0, 50.0))
def test_kl_ignores_a_shift_of_all_logits(seed: int, temperature: float, shift: float, other: float) -> None:
    student, teacher = pair(seed, 3.0)
    plain = float(forward_kl(student, teacher, temperature))
    assert float(forward_kl(student + shift, teacher + other, temperature)) == pytest.approx(plain, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_first_and_second_derivatives_agree_with_differences(temperature: float) -> None:
    torch.manual_seed(0)
    taught, tokens = torch.randn(1, 3, 5, dtype=torch.float64), torch.randint(0, 5, (1, 3))
    logits = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)
    objective = Distill(temperature=temperature, task_weight=1.0, kl_weight=0.7)

    def total(x: torch.Tensor) -> torch.Tensor:
        return objective.losses(x, taught, tokens).total

    assert torch.autograd.gradcheck(total, (logits,))
    assert torch.autograd.gradgradcheck(total, (logits,))


def test_then_changes_its_part_at_a_share_of_the_plan() -> None:
    before, after = Distill(task_weight=1.0, kl_weight=1.0, temperature=2.0), TaskOnly()
    objective = Then(before=before, after=after, switch_at=0.85)
    assert [objective.at(p) for p in (0.0, 0.8499, 0.85, 1.0)] == [before, before, after, after]
    assert objective.distills
    assert decode(encode(objective), Objective) == objective
    assert TaskOnly().at(0.3) == TaskOnly()


def test_then_refuses_what_one_run_cannot_do() -> None:
    tiny = tiny_source("llama")
    with pytest.raises(RecipeError, match=r"switch_at=1\.0"):
        Then(before=Distill(), after=TaskOnly(), switch_at=1.0)
    with pytest.raises(RecipeError, match=r"after\.teacher"):
        Then(before=Distill(), after=Distill(teacher=tiny), switch_at=0.5)
    inner = Then(before=Distill(), after=TaskOnly(), switch_at=0.5)
    with pytest.raises(RecipeError, match="one switch"):
        Then(before=inner, after=TaskOnly(), switch_at=0.5)
    assert Then(before=Distill(teacher=tiny), after=TaskOnly(), switch_at=0.5).teacher == tiny
