"""What is minimised: cross-entropy, alone or with a teacher. The one room that shifts labels."""

from __future__ import annotations

from sparseforge_core.objective.batch import batch_losses, faster, forwards, predictions
from sparseforge_core.objective.divergence import forward_kl, next_token_loss
from sparseforge_core.objective.hidden import HiddenMatch
from sparseforge_core.objective.objectives import Distill, Losses, Objective, TaskOnly, Then
from sparseforge_core.objective.teaching import Draws, Full, Sampled, TeacherLogits, TopK

__all__ = [
    "Distill",
    "Draws",
    "Full",
    "HiddenMatch",
    "Losses",
    "Objective",
    "Sampled",
    "TaskOnly",
    "TeacherLogits",
    "Then",
    "TopK",
    "batch_losses",
    "faster",
    "forward_kl",
    "forwards",
    "next_token_loss",
    "predictions",
]
