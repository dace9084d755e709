"""How much of a teacher's distribution is taught: all of it, its most likely entries, or a sample of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sparseforge_core.errors import RecipeError
from sparseforge_core.objective.divergence import SparseTarget, wide
from sparseforge_core.specs import spec

STREAM = 0x7EAC
"""Keeps the draws of teachers apart from the order of the batches, which has the same seed."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Uniform numbers that are a pure function of (seed, step, row): neither micro-batches nor a resume move them."""

    seed: int
    """The cell's."""
    step: int
    row: int = 0
    """Position in the step's batch of the first sequence at hand."""

    def uniform(self, rows: int, positions: int, count: int) -> Tensor:
        """Numbers in [0, 1), float64 `[rows, positions, count]`."""
        generators = (
            np.random.Generator(np.random.PCG64([self.seed, self.step, self.row + i, STREAM])) for i in range(rows)
        )
        return torch.from_numpy(np.stack([generator.random((positions, count)) for generator in generators]))


class TeacherLogits(ABC):
    """Base of everything that turns a teacher's logits into what the student is compared with."""

    dense: ClassVar[bool] = False
    """Whether the target is as large as the logits themselves."""

    @property
    def samples(self) -> int:
        """Uniform numbers that a position needs."""
        return 0

    @abstractmethod
    def target(self, logits: Tensor, temperature: float, uniform: Tensor | None) -> Tensor | SparseTarget:
        """The target of logits `[..., vocabulary]`; `uniform` is `[..., samples]`, None where there are none."""

    @abstractmethod
    def check(self, vocabulary: int) -> None:
        """Raise RecipeError unless a vocabulary of that size can be taught in this way."""


@spec("full")
class Full(TeacherLogits):
    """Every entry of the vocabulary."""

    dense = True

    def target(self, logits: Tensor, temperature: float, uniform: Tensor | None) -> Tensor | SparseTarget:
        return logits

    def check(self, vocabulary: int) -> None:
        """Any vocabulary will do."""


@spec("top-k")
class TopK(TeacherLogits):
    """The k most likely entries, renormalised. Biased: the student learns that the tail is empty (arXiv 2503.16870)."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RecipeError(f"k={self.k}: must be at least 1")

    def target(self, logits: Tensor, temperature: float, uniform: Tensor | None) -> Tensor | SparseTarget:
        kept = torch.log_softmax(wide(logits) / temperature, dim=-1).topk(self.k, dim=-1)
        log_teacher = torch.log_softmax(kept.values, dim=-1)
        return SparseTarget(kept.indices, log_teacher.exp(), log_teacher)

    def check(self, vocabulary: int) -> None:
        if self.k > vocabulary:
            raise RecipeError(f"k={self.k}: the vocabulary has {vocabulary} entries")


@spec("sampled")
class Sampled(TeacherLogits):
    """n entries a position, drawn with replacement from the teacher at T, each weighing 1 / n (arXiv 2503.16870).

    Loss and gradient are unbiased: their mean over the draws is that of the full distribution. One draw of the
    divergence may be below 0.
    """

    n: int = 12
    """Draws a position; about a dozen do, says the paper."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise RecipeError(f"n={self.n}: must be at least 1")

    @property
    def samples(self) -> int:
        return self.n

    def target(self, logits: Tensor, temperature: float, uniform: Tensor | None) -> Tensor | SparseTarget:
        if uniform is None:
            raise RecipeError("objective.teacher_logits: sampling needs the step's draws, and none were given")
        log_teacher = torch.log_softmax(wide(logits) / temperature, dim=-1)
        # float64, or the rounding of 100,000 additions would decide which rare tokens are ever drawn
        below = log_teacher.double().exp().cumsum(dim=-1)
        wanted = uniform.to(below) * below[..., -1:]
        ids = torch.searchsorted(below, wanted, right=True).clamp(max=logits.shape[-1] - 1)
        picked = log_teacher.gather(-1, ids)
        return SparseTarget(ids, torch.full_like(picked, 1.0 / self.n), picked)

    def check(self, vocabulary: int) -> None:
        """Any vocabulary will do: entries may be drawn more than once."""
