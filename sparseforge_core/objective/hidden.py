"""Matching a teacher's hidden states: the normalised squared error of SquareHead (arXiv 2310.06927)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseforge_core.errors import DataError, RecipeError
from sparseforge_core.objective.divergence import wide
from sparseforge_core.specs import spec


@spec("hidden-match")
class HiddenMatch:
    """weight x mean over layers and sequences of |student - teacher|^2 / |teacher|^2.

    SquareHead normalises over a batch; a sequence is the largest unit whose mean does not depend on how a batch is
    cut into micro-batches.
    """

    weight: float = 1.0
    """Factor of this term in the loss."""
    layers: tuple[int, ...] | None = None
    """Blocks of the student whose outputs are matched, from 1; None takes all. The last is taken after its norm."""
    teacher_layers: tuple[int, ...] | None = None
    """The teacher's block for each of `layers`; None takes the same numbers."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise RecipeError(f"hidden.weight={self.weight}: must be above 0; leave `hidden` out for no matching")
        for name in ("layers", "teacher_layers"):
            chosen = getattr(self, name)
            if chosen is not None and (not chosen or min(chosen) < 1):
                raise RecipeError(f"hidden.{name}={list(chosen)}: name at least one block; blocks count from 1")
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise RecipeError(f"hidden.layers={list(self.layers)}: each block once")
        if self.teacher_layers is not None and len(self.teacher_layers) != len(self.layers or ()):
            raise RecipeError(
                f"hidden.teacher_layers={list(self.teacher_layers)}: needs one entry for each of hidden.layers="
                f"{list(self.layers or ())}"
            )

    def check(self, student: tuple[int, int], teacher: tuple[int, int]) -> None:
        """Raise DataError, naming the field, unless two models of these (width, blocks) can be matched."""
        if student[0] != teacher[0]:
            raise DataError(
                f"objective.hidden: the teacher's hidden states have width {teacher[0]}, the student's {student[0]}; "
                "match logits alone, or use a teacher of the same width"
            )
        if self.layers is None and student[1] != teacher[1]:
            raise DataError(
                f"objective.hidden: the teacher has {teacher[1]} blocks, the student {student[1]}; say which belong "
                "together in objective.hidden.layers and objective.hidden.teacher_layers"
            )
        named = {
            "layers": (self.layers, student[1]),
            "teacher_layers": (self.teacher_layers or self.layers, teacher[1]),
        }
        for name, (chosen, blocks) in named.items():
            if chosen is not None and max(chosen) > blocks:
                raise DataError(f"objective.hidden.{name}: block {max(chosen)} was asked for, the model has {blocks}")

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Mean normalised error, without the weight; states `[batch, length, width]`, the embeddings' first."""
        ours = self.layers or tuple(range(1, len(student)))
        theirs = self.teacher_layers or ours
        errors = [_normalised(wide(student[s]), wide(teacher[t])) for s, t in zip(ours, theirs, strict=True)]
        return torch.stack(errors).mean()


def _normalised(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over sequences of the squared error over the teacher's square, both summed over a sequence."""
    error = (student - teacher).square().sum(dim=(1, 2))
    return (error / teacher.square().sum(dim=(1, 2)).clamp_min(torch.finfo(teacher.dtype).tiny)).mean()
