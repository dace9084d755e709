"""The two losses of a position as pure functions of logits: cross-entropy and forward KL, dense or on few entries.

All are computed in float32, in float64 where the logits are, and leave their inputs untouched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SparseTarget:
    """A teacher's distribution on few entries of the vocabulary, each tensor `[..., entries]`."""

    ids: Tensor
    """Token ids; one may occur more than once."""
    weights: Tensor
    """Weight of each entry; they add up to 1."""
    log_teacher: Tensor
    """Log-probability that the student's is compared with at each entry."""


def wide(logits: Tensor) -> Tensor:
    """The logits in float32, or in float64 where they are that already."""
    return logits if logits.dtype == torch.float64 else logits.float()


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of position t's logits for token t + 1; `[batch, length, vocabulary]`, `[batch, length]`."""
    flat = wide(logits[:, :-1].reshape(-1, logits.shape[-1]))
    return F.cross_entropy(flat, tokens[:, 1:].reshape(-1))


def forward_kl(logits: Tensor, teacher: Tensor | SparseTarget, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over tokens."""
    student = torch.log_softmax(wide(logits) / temperature, dim=-1)
    return temperature**2 * token_kl(student, teacher, temperature).mean()


def token_kl(student: Tensor, teacher: Tensor | SparseTarget, temperature: float) -> Tensor:
    """KL at each position, `[...]`: `student` holds log-probabilities `[..., vocabulary]`, a dense teacher logits."""
    if isinstance(teacher, SparseTarget):
        return (teacher.weights * (teacher.log_teacher - student.gather(-1, teacher.ids))).sum(-1)
    log_teacher = torch.log_softmax(wide(teacher) / temperature, dim=-1)
    return F.kl_div(student, log_teacher, reduction="none", log_target=True).sum(-1)


def summed_losses(
    logits: Tensor, labels: Tensor, teacher: Tensor | SparseTarget | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sums over positions of cross-entropy and of KL (without T^2; 0 without a teacher): `[n, vocabulary]`, `[n]`."""
    logits = wide(logits)
    student = torch.log_softmax(logits, dim=-1)
    task = F.nll_loss(student, labels, reduction="sum")
    if teacher is None:
        return task, torch.zeros_like(task)
    if temperature != 1.0:  # at 1 both losses share one log-softmax: a third less memory
        student = torch.log_softmax(logits / temperature, dim=-1)
    return task, token_kl(student, teacher, temperature).sum()
