"""What is minimised: cross-entropy, alone or with forward KL to a teacher. The one place that shifts labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseforge_core.errors import DataError, RecipeError
from sparseforge_core.models.sources import ModelSource
from sparseforge_core.specs import spec


@dataclass(frozen=True)
class Losses:
    """Losses of one batch, each a mean over predicted tokens (nats)."""

    total: Tensor
    task: Tensor
    kl: Tensor | None


class Objective(ABC):
    """The loss of a batch, eq. (2) without L_mid (which acts through the mask update alone)."""

    @property
    @abstractmethod
    def distills(self) -> bool:
        """Whether a teacher's logits are needed."""

    @abstractmethod
    def losses(self, logits: Tensor, teacher_logits: Tensor | None, tokens: Tensor) -> Losses:
        """Losses of `logits` `[batch, length, vocabulary]` for `tokens` `[batch, length]`; inputs are untouched."""


@spec("task-only")
class TaskOnly(Objective):
    """Next-token cross-entropy."""

    @property
    def distills(self) -> bool:
        return False

    def losses(self, logits: Tensor, teacher_logits: Tensor | None, tokens: Tensor) -> Losses:
        task = next_token_loss(logits, tokens)
        return Losses(task, task, None)


@spec("distill")
class Distill(Objective):
    """(1 - w) CE + w T^2 KL(teacher || student), both means over predicted tokens."""

    kl_weight: float = 0.5
    """w: share of the divergence."""
    temperature: float = 1.0
    """T of both distributions in the divergence."""
    teacher: ModelSource | None = None
    """Who teaches; None is the recipe's own dense model."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.kl_weight <= 1.0:
            raise RecipeError(f"kl_weight={self.kl_weight}: must lie in [0, 1]")
        if self.temperature <= 0:
            raise RecipeError(f"temperature={self.temperature}: must be above 0")

    @property
    def distills(self) -> bool:
        return True

    def losses(self, logits: Tensor, teacher_logits: Tensor | None, tokens: Tensor) -> Losses:
        if teacher_logits is None:
            raise RecipeError("objective: distillation was asked for without teacher logits")
        if teacher_logits.shape[-1] != logits.shape[-1]:
            raise DataError(
                f"objective.teacher: its vocabulary has {teacher_logits.shape[-1]} entries, the student's "
                f"{logits.shape[-1]}; distillation needs the same vocabulary"
            )
        task = next_token_loss(logits, tokens)
        kl = forward_kl(logits[:, :-1], teacher_logits[:, :-1], self.temperature)
        return Losses((1.0 - self.kl_weight) * task + self.kl_weight * kl, task, kl)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of position t's logits for token t + 1, computed in float32."""
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, tokens[:, 1:].reshape(-1))


def forward_kl(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over tokens, float32, without changing its inputs."""
    student = torch.log_softmax(logits.float() / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * divergence.mean()


def batch_losses(model: Any, teacher: Any | None, objective: Objective, tokens: Tensor) -> Losses:
    """Run student and teacher on `tokens` and compute the losses."""
    logits = model(input_ids=tokens, use_cache=False).logits
    if not objective.distills:
        return objective.losses(logits, None, tokens)
    with torch.no_grad():
        taught = teacher(input_ids=tokens, use_cache=False).logits if teacher is not None else None
    return objective.losses(logits, taught, tokens)


def predictions(model: Any, tokens: Tensor) -> Tensor:
    """Logits of every position that has a next token, `[batch, length - 1, vocabulary]`."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[:, :-1]
