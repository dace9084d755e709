"""Matched hidden states: the normalised error, and what does not fit refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparseforge_core.errors import DataError, RecipeError
from sparseforge_core.objective import Distill, HiddenMatch, batch_losses
from tests.tiny import ARCHITECTURES, tiny_model, tokens


def states(seed: int, blocks: int = 3) -> list[torch.Tensor]:
    """The embeddings' states and those of `blocks` blocks, float64 `[2, 4, 6]`."""
    return list(
        torch.randn(blocks + 1, 2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()
    )


def test_the_error_is_relative_to_the_teachers_square() -> None:
    student, teacher = states(0), states(1)
    expected = [
        float(((s[row] - t[row]) ** 2).sum() / (t[row] ** 2).sum())
        for s, t in zip(student[1:], teacher[1:], strict=True)
        for row in range(2)
    ]
    loss = float(HiddenMatch().loss(student, teacher))
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    scaled = float(HiddenMatch().loss([10 * s for s in student], [10 * t for t in teacher]))
    assert scaled == pytest.approx(loss, rel=1e-12)
    assert float(HiddenMatch().loss(teacher, teacher)) == 0.0


def test_chosen_layers_are_compared_as_mapped() -> None:
    student, teacher = states(0), states(1, blocks=6)
    match = HiddenMatch(layers=(1, 3), teacher_layers=(2, 6))
    pairs = [
        HiddenMatch(layers=(1,)).loss([student[0], student[s]], [teacher[0], teacher[t]]) for s, t in ((1, 2), (3, 6))
    ]
    assert float(match.loss(student, teacher)) == pytest.approx(float(sum(pairs)) / 2, rel=1e-12)


def test_micro_batches_add_up_to_the_batch() -> None:
    student, teacher = states(0), states(1)
    rows = [HiddenMatch().loss([s[r : r + 1] for s in student], [t[r : r + 1] for t in teacher]) for r in range(2)]
    assert float(HiddenMatch().loss(student, teacher)) == pytest.approx(float(sum(rows)) / 2, rel=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_reports_its_blocks(architecture: str) -> None:
    model, teacher = tiny_model(architecture), tiny_model(architecture, seed=1)
    losses = batch_losses(model, teacher, Distill(hidden=HiddenMatch(weight=0.5)), tokens())
    plain = batch_losses(model, teacher, Distill(), tokens())
    assert losses.hidden is not None
    assert float(losses.hidden.detach()) > 0.1
    torch.testing.assert_close(losses.total, plain.total + 0.5 * losses.hidden)
    same = batch_losses(model, model, Distill(hidden=HiddenMatch(layers=(2,))), tokens())
    assert same.hidden is not None
    assert float(same.hidden.detach()) == 0.0
    with pytest.raises(IndexError):
        batch_losses(model, model, Distill(hidden=HiddenMatch(layers=(3,))), tokens())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weight": 0.0}, r"hidden\.weight=0\.0"),
        ({"layers": ()}, r"hidden\.layers=\[\]"),
        ({"layers": (0, 1)}, r"hidden\.layers=\[0, 1\]"),
        ({"layers": (1, 1)}, r"hidden\.layers=\[1, 1\]: each block once"),
        ({"teacher_layers": (1,)}, r"hidden\.teacher_layers=\[1\]: needs one entry"),
        ({"layers": (1, 2), "teacher_layers": (1,)}, r"hidden\.teacher_layers=\[1\]: needs one entry"),
    ],
)
def test_bad_layers_are_refused_by_field(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        HiddenMatch(**changes)


@pytest.mark.parametrize(
    ("match", "teacher", "named"),
    [
        (HiddenMatch(), (96, 2), r"objective\.hidden: the teacher's hidden states have width 96"),
        (HiddenMatch(), (64, 4), r"objective\.hidden: the teacher has 4 blocks"),
        (HiddenMatch(layers=(1, 3)), (64, 4), r"objective\.hidden\.layers: block 3"),
        (HiddenMatch(layers=(1, 2), teacher_layers=(2, 5)), (64, 4), r"objective\.hidden\.teacher_layers: block 5"),
        (HiddenMatch(layers=(2,)), (64, 1), r"objective\.hidden\.teacher_layers: block 2"),
    ],
)
def test_teachers_that_do_not_fit_are_refused_by_field(
    match: HiddenMatch, teacher: tuple[int, int], named: str
) -> None:
    with pytest.raises(DataError, match=named):
        match.check((64, 2), teacher)
    HiddenMatch(layers=(1, 2), teacher_layers=(2, 4)).check((64, 2), (64, 4))
