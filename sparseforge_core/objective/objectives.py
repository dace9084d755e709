"""The objectives that a recipe can name, and what each makes of the losses of a batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparseforge_core.errors import DataError, RecipeError
from sparseforge_core.models.sources import ModelSource
from sparseforge_core.objective.correction import TeacherCorrection
from sparseforge_core.objective.divergence import SparseTarget, forward_kl, next_token_loss, summed_losses
from sparseforge_core.objective.hidden import HiddenMatch
from sparseforge_core.objective.teaching import Full, TeacherLogits
from sparseforge_core.specs import spec


@dataclass(frozen=True)
class Losses:
    """Losses of one batch, each a mean over predicted tokens (nats); `hidden` is one over layers and sequences."""

    total: Tensor
    task: Tensor
    kl: Tensor | None
    hidden: Tensor | None = None
    teacher: Tensor | None = None
    """The teacher's own loss, where it takes steps; no part of `total`."""


class Objective(ABC):
    """The loss of a batch, eq. (2) without L_mid (which acts through the mask update alone)."""

    @property
    @abstractmethod
    def distills(self) -> bool:
        """Whether a teacher's logits are needed."""

    def at(self, progress: float) -> Objective:
        """What is minimised in the step that begins at this share of the plan; most objectives never change."""
        return self

    @property
    def matching(self) -> HiddenMatch | None:
        """How hidden states are matched, if they are."""
        return None

    @property
    def correcting(self) -> TeacherCorrection | None:
        """How the teacher follows the text, if it does."""
        return None

    @property
    def teacher_bytes(self) -> int:
        """Bytes of a weight of the teacher: bfloat16, or all that a float32 weight trains with and, where it is held, a
        second copy in bfloat16; 0 without a teacher."""
        if not self.distills:
            return 0
        if self.correcting is None:
            return 2
        return 18 if self.correcting.anchor else 16

    @property
    def taught(self) -> TeacherLogits:
        """What of a teacher's logits is used."""
        return Full()

    @property
    def weights(self) -> tuple[float, float, float] | None:
        """(w_task, w, T) where the loss is w_task CE + w T^2 KL; None where it is something else."""
        return None

    @abstractmethod
    def losses(
        self, logits: Tensor, teacher_logits: Tensor | None, tokens: Tensor, uniform: Tensor | None = None
    ) -> Losses:
        """Losses of `logits` `[batch, length, vocabulary]` for `tokens` `[batch, length]`; inputs are untouched.

        `uniform`, `[batch, length - 1, samples]`, is what sampled teacher logits are drawn with.
        """

    def target(self, teacher_logits: Tensor, uniform: Tensor | None) -> Tensor | SparseTarget:
        """What the student is compared with at the positions of `teacher_logits` `[..., vocabulary]`."""
        raise RecipeError(f"objective: {type(self).__name__} has no teacher")

    @abstractmethod
    def sums(self, logits: Tensor, teacher: Tensor | SparseTarget | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of both losses over some positions: logits `[n, vocabulary]` that predict `labels` `[n]`."""

    @abstractmethod
    def of_sums(self, task: Tensor, kl: Tensor, count: int) -> Losses:
        """The losses of a batch of `count` predicted tokens whose `sums` add up to these."""

    def with_hidden(self, losses: Losses, hidden: Tensor | None) -> Losses:
        """The losses with the term of matched hidden states added."""
        if self.matching is None or hidden is None:
            return losses
        return Losses(losses.total + self.matching.weight * hidden, losses.task, losses.kl, hidden)

    def check(self, student: Any, teacher: Any) -> None:
        """Raise DataError or RecipeError, by field, unless a model of one configuration can teach the other's."""
        _same_vocabulary(student.vocab_size, teacher.vocab_size)


@spec("task-only")
class TaskOnly(Objective):
    """Next-token cross-entropy."""

    @property
    def distills(self) -> bool:
        return False

    @property
    def weights(self) -> tuple[float, float, float] | None:
        return 1.0, 0.0, 1.0

    def losses(
        self, logits: Tensor, teacher_logits: Tensor | None, tokens: Tensor, uniform: Tensor | None = None
    ) -> Losses:
        task = next_token_loss(logits, tokens)
        return Losses(task, task, None)

    def sums(self, logits: Tensor, teacher: Tensor | SparseTarget | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        return summed_losses(logits, labels, None, 1.0)

    def of_sums(self, task: Tensor, kl: Tensor, count: int) -> Losses:
        return Losses(task / count, task / count, None)


@spec("distill")
class Distill(Objective):
    """w_task CE + w T^2 KL(teacher || student), both means over predicted tokens; w_task is 1 - w unless given.

    The paper's sum is `task_weight=1.0, kl_weight=1.0`; AST's are 1 and 0.5, and 0.33 and 0.67.
    """

    kl_weight: float = 0.5
    """w: share of the divergence; its plain factor where `task_weight` is given."""
    temperature: float = 1.0
    """T of both distributions in the divergence."""
    teacher: ModelSource | None = None
    """Who teaches, of the same vocabulary; None is the recipe's own dense model."""
    task_weight: float | None = None
    """w_task: factor of the cross-entropy; None is 1 - w."""
    teacher_logits: TeacherLogits = Full()
    """What of the teacher's distribution is used."""
    hidden: HiddenMatch | None = None
    """Whether the hidden states are matched too."""
    correction: TeacherCorrection | None = None
    """Whether the teacher takes steps on the text too; None keeps it as it is."""

    def __post_init__(self) -> None:
        if self.task_weight is None and not 0.0 <= self.kl_weight <= 1.0:
            raise RecipeError(f"kl_weight={self.kl_weight}: must lie in [0, 1]; give task_weight too for a plain sum")
        if self.task_weight is not None:
            for name, weight in (("task_weight", self.task_weight), ("kl_weight", self.kl_weight)):
                if not 0.0 <= weight < math.inf:
                    raise RecipeError(f"{name}={weight}: must be 0 or more")
            if self.task_weight == self.kl_weight == 0.0 and self.hidden is None:
                raise RecipeError("task_weight=0.0: with kl_weight=0.0 nothing is minimised")
        if not 0.0 < self.temperature < math.inf:
            raise RecipeError(f"temperature={self.temperature}: must be above 0")

    @property
    def distills(self) -> bool:
        return True

    @property
    def weights(self) -> tuple[float, float, float] | None:
        share = 1.0 - self.kl_weight if self.task_weight is None else self.task_weight
        return share, self.kl_weight, self.temperature

    @property
    def matching(self) -> HiddenMatch | None:
        return self.hidden

    @property
    def correcting(self) -> TeacherCorrection | None:
        return self.correction

    @property
    def taught(self) -> TeacherLogits:
        return self.teacher_logits

    def losses(
        self, logits: Tensor, teacher_logits: Tensor | None, tokens: Tensor, uniform: Tensor | None = None
    ) -> Losses:
        if teacher_logits is None:
            raise RecipeError("objective: distillation was asked for without teacher logits")
        _same_vocabulary(logits.shape[-1], teacher_logits.shape[-1])
        task = next_token_loss(logits, tokens)
        kl = forward_kl(logits[:, :-1], self.target(teacher_logits[:, :-1], uniform), self.temperature)
        return self._weighted(task, kl)

    def target(self, teacher_logits: Tensor, uniform: Tensor | None) -> Tensor | SparseTarget:
        return self.teacher_logits.target(teacher_logits, self.temperature, uniform)

    def sums(self, logits: Tensor, teacher: Tensor | SparseTarget | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        return summed_losses(logits, labels, teacher, self.temperature)

    def of_sums(self, task: Tensor, kl: Tensor, count: int) -> Losses:
        return self._weighted(task / count, self.temperature**2 * kl / count)

    def _weighted(self, task: Tensor, kl: Tensor) -> Losses:
        share = 1.0 - self.kl_weight if self.task_weight is None else self.task_weight
        return Losses(share * task + self.kl_weight * kl, task, kl)

    def check(self, student: Any, teacher: Any) -> None:
        super().check(student, teacher)
        try:
            self.teacher_logits.check(student.vocab_size)
        except RecipeError as error:
            raise RecipeError(f"objective.teacher_logits.{error}") from error
        if self.hidden is not None:
            shapes = [(config.hidden_size, config.num_hidden_layers) for config in (student, teacher)]
            self.hidden.check(shapes[0], shapes[1])


@spec("then")
class Then(Objective):
    """One objective up to a share of the plan, another from there: the paper's finetune has no teacher any more."""

    before: Objective
    after: Objective
    switch_at: float

    def __post_init__(self) -> None:
        if not 0.0 < self.switch_at < 1.0:
            raise RecipeError(f"switch_at={self.switch_at}: must lie between 0 and 1, both excluded")
        if any(isinstance(part, Then) for part in (self.before, self.after)):
            raise RecipeError("before, after: a plan has one switch; neither may be another 'then'")
        for name in ("teacher", "correction"):
            if len({getattr(part, name) for part in self._distilling()}) > 1:
                raise RecipeError(f"after.{name}: both parts need the same {name}; a run holds one")

    def _distilling(self) -> list[Distill]:
        return [part for part in (self.before, self.after) if isinstance(part, Distill)]

    @property
    def teacher(self) -> ModelSource | None:
        """Who teaches, in whichever part does."""
        return next((part.teacher for part in self._distilling()), None)

    @property
    def correcting(self) -> TeacherCorrection | None:
        return next((part.correction for part in self._distilling()), None)

    @property
    def distills(self) -> bool:
        return self.before.distills or self.after.distills

    def at(self, progress: float) -> Objective:
        return self.before if progress < self.switch_at else self.after

    def losses(
        self, logits: Tensor, teacher_logits: Tensor | None, tokens: Tensor, uniform: Tensor | None = None
    ) -> Losses:
        raise RecipeError("objective: 'then' has no losses of its own; ask `at(progress)` for the part in force")

    def sums(self, logits: Tensor, teacher: Tensor | SparseTarget | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        raise RecipeError("objective: 'then' has no losses of its own; ask `at(progress)` for the part in force")

    def of_sums(self, task: Tensor, kl: Tensor, count: int) -> Losses:
        raise RecipeError("objective: 'then' has no losses of its own; ask `at(progress)` for the part in force")

    def check(self, student: Any, teacher: Any) -> None:
        for part in self._distilling():
            part.check(student, teacher)


def _same_vocabulary(student: int, teacher: int) -> None:
    if teacher != student:
        raise DataError(
            f"objective.teacher: its vocabulary has {teacher} entries, the student's {student}; distillation needs the "
            "same vocabulary"
        )
