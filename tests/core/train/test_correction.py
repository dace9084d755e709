"""A teacher that takes steps on the text: what a step is, that it teaches before it learns, and that it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import RecipeError
from sparseforge_core.execution import Execution
from sparseforge_core.methods import FrozenMask, SparseForge
from sparseforge_core.models.heads import split
from sparseforge_core.objective import Distill, TaskOnly, Then, batch_losses
from sparseforge_core.objective.correction import TeacherCorrection
from sparseforge_core.recipe import Cell, Recipe, TrainPlan
from sparseforge_core.run import train_cell
from sparseforge_core.schedules import Constant, WarmupLinear
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.tracking.tracker import read_journal
from sparseforge_core.train.correction import Correction
from sparseforge_core.train.optimizer import clip
from tests.core.train.stopping import whole_and_in_parts
from tests.tiny import tiny_model, tiny_source, tokens

STEPS = 12
CORRECTED = Distill(correction=TeacherCorrection(rate_scale=0.5))
HELD = Distill(correction=TeacherCorrection(rate_scale=0.5, anchor=0.75))


def _recipe(objective: Distill | Then = CORRECTED, method: FrozenMask | SparseForge | None = None) -> Recipe:
    return Recipe(
        model=tiny_source("llama"),
        method=method or FrozenMask(),
        corpus=Synthetic(documents_count=60),
        pattern=nm(2, 4),
        objective=objective,
        train=TrainPlan(steps=STEPS, sequences=4, length=16, lr=WarmupLinear(peak=3e-3)),
    )


def _losses(folder: Path, name: str) -> dict[int, float]:
    lines, _ = read_journal(folder / "journal.jsonl")
    return {line["step"]: line["scalars"][name] for line in lines if name in line.get("scalars", {})}


def test_a_step_is_adamws_at_a_share_of_the_rate() -> None:
    torch.manual_seed(0)
    teacher = nn.Linear(4, 3, bias=False)
    alone = nn.Linear(4, 3, bias=False)
    alone.load_state_dict(teacher.state_dict())
    plan = TrainPlan(steps=10, lr=Constant(value=0.02), clip=1e9)
    x = torch.randn(6, 4)
    teacher(x).square().mean().backward()
    Correction(teacher, TeacherCorrection(rate_scale=0.25), plan).step(0.5, clip)
    assert teacher.weight.grad is None
    rule = torch.optim.AdamW(alone.parameters(), lr=0.005, betas=plan.betas, eps=plan.eps, weight_decay=0.0)
    alone(x).square().mean().backward()
    rule.step()
    torch.testing.assert_close(teacher.weight, alone.weight)


@pytest.mark.parametrize("whole", [True, False])
def test_the_student_gets_the_gradient_that_a_fixed_teacher_gives(whole: bool) -> None:
    model, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    forward, taught = (model, teacher) if whole else (split(model), split(teacher))
    ids = tokens(3, 12)
    losses = batch_losses(forward, taught, CORRECTED, ids, correct=True)
    assert losses.teacher is not None
    (losses.total + losses.teacher).backward()  # type: ignore[no-untyped-call]
    ours, theirs = ([p.grad.clone() for p in m.parameters()] for m in (model, teacher))
    model.zero_grad()
    teacher.zero_grad()
    batch_losses(forward, taught, Distill(), ids).total.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in teacher.parameters())
    batch_losses(taught, None, TaskOnly(), ids).total.backward()  # type: ignore[no-untyped-call]
    for grads, m in ((ours, model), (theirs, teacher)):
        for grad, parameter in zip(grads, m.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad)


@pytest.mark.parametrize("whole", [True, False])
def test_one_that_is_held_gets_the_gradient_of_distillation_from_what_it_came_as(whole: bool) -> None:
    models = tiny_model("llama"), tiny_model("llama", seed=1), tiny_model("llama", seed=2).requires_grad_(False)
    forward, taught, anchor = models if whole else map(split, models)
    ids = tokens(3, 12)
    losses = batch_losses(forward, taught, HELD, ids, correct=True, anchor=anchor)
    assert losses.teacher is not None
    (losses.total + losses.teacher).backward()  # type: ignore[no-untyped-call]
    ours, theirs = ([p.grad.clone() for p in m.parameters()] for m in models[:2])
    for model in models[:2]:
        model.zero_grad()
    batch_losses(forward, taught, Distill(), ids).total.backward()  # type: ignore[no-untyped-call]
    batch_losses(taught, anchor, Distill(kl_weight=0.75), ids).total.backward()  # type: ignore[no-untyped-call]
    for grads, m in zip((ours, theirs), models[:2], strict=True):
        for grad, parameter in zip(grads, m.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad)
    assert all(p.grad is None for p in models[2].parameters())
    with pytest.raises(RecipeError, match=r"correction\.anchor"):
        batch_losses(forward, taught, HELD, ids, correct=True)


def test_one_that_is_held_stays_nearer_to_what_it_came_as(tmp_path: Path) -> None:
    for name, objective in (("free", CORRECTED), ("held", HELD), ("stays", Distill())):
        train_cell(Cell(recipe=_recipe(objective)), tmp_path / name, tmp_path / "home")
    free, held, stays = (_losses(tmp_path / name, "loss/kl") for name in ("free", "held", "stays"))
    assert held[1] == free[1] == stays[1]
    # What a student is taught with lies between what it came as and what follows the text alone.
    assert abs(held[STEPS] - stays[STEPS]) < abs(free[STEPS] - stays[STEPS])
    assert _losses(tmp_path / "held", "loss/teacher")[1] == pytest.approx(
        0.25 * _losses(tmp_path / "free", "loss/teacher")[1], rel=1e-5
    ), "at first it is what it is held to: the divergence is zero"


def test_it_teaches_a_batch_before_it_learns_from_it(tmp_path: Path) -> None:
    train_cell(Cell(recipe=_recipe()), tmp_path / "follows", tmp_path / "home")
    train_cell(Cell(recipe=_recipe(Distill())), tmp_path / "stays", tmp_path / "home")
    follows, stays = (_losses(tmp_path / name, "loss/kl") for name in ("follows", "stays"))
    assert follows[1] == stays[1]
    assert follows[STEPS] != stays[STEPS]
    taught = _losses(tmp_path / "follows", "loss/teacher")
    assert taught[STEPS] < taught[1]
    assert not _losses(tmp_path / "stays", "loss/teacher")


def test_it_may_learn_from_some_batches_and_teach_all(tmp_path: Path) -> None:
    rare = Distill(correction=TeacherCorrection(rate_scale=0.5, every=5))
    for name, objective in (("rare", rare), ("stays", Distill())):
        train_cell(Cell(recipe=_recipe(objective)), tmp_path / name, tmp_path / "home")
    spec = rare.correction
    assert spec is not None
    assert [step for step in range(1, STEPS + 1) if spec.is_due(step)] == [5, 10]
    assert set(_losses(tmp_path / "rare", "loss/teacher")) == {5, 10}
    taught, stays = (_losses(tmp_path / name, "loss/kl") for name in ("rare", "stays"))
    assert taught[1] == stays[1]
    assert taught[STEPS] != stays[STEPS]


@pytest.mark.parametrize(
    ("objective", "method"), [(CORRECTED, FrozenMask()), (CORRECTED, SparseForge()), (HELD, FrozenMask())]
)
@pytest.mark.parametrize("stop", [1, 7])
def test_a_stopped_run_resumes_to_the_bit(
    tmp_path: Path, objective: Distill, method: FrozenMask | SparseForge, stop: int
) -> None:
    hashes = whole_and_in_parts(Cell(recipe=_recipe(objective, method)), tmp_path, stop)
    assert hashes[0] == hashes[1]
    assert _losses(tmp_path / "whole", "loss/teacher")[STEPS] == _losses(tmp_path / "parts", "loss/teacher")[STEPS]


@pytest.mark.parametrize("objective", [CORRECTED, HELD])
def test_micro_batches_make_the_same_step(tmp_path: Path, objective: Distill) -> None:
    cell = Cell(recipe=_recipe(objective))
    train_cell(cell, tmp_path / "whole", tmp_path / "home")
    train_cell(cell, tmp_path / "cut", tmp_path / "home", execution=Execution(micro_batch=1))
    whole, cut = (_losses(tmp_path / name, "loss/teacher") for name in ("whole", "cut"))
    assert cut[STEPS] == pytest.approx(whole[STEPS], rel=1e-4)


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"correction\.rate_scale=0"):
        TeacherCorrection(rate_scale=0.0)
    with pytest.raises(RecipeError, match=r"correction\.every=0"):
        TeacherCorrection(every=0)
    for anchor in (-0.1, 1.0, float("nan")):
        with pytest.raises(RecipeError, match=r"correction\.anchor"):
            TeacherCorrection(anchor=anchor)
    with pytest.raises(RecipeError, match=r"after\.correction"):
        Then(before=CORRECTED, after=Distill(), switch_at=0.5)
    assert Then(before=CORRECTED, after=TaskOnly(), switch_at=0.5).correcting == CORRECTED.correction
    assert [objective.teacher_bytes for objective in (TaskOnly(), Distill(), CORRECTED, HELD)] == [0, 2, 16, 18]
