"""The objective against its formula, with its inputs untouched."""

from __future__ import annotations

import pytest
import torch

from sparseforge_core.errors import DataError, RecipeError
from sparseforge_core.objective import Distill, TaskOnly, forward_kl, next_token_loss


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
