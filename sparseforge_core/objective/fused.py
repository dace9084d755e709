"""The losses of a split model on a GPU, with their gradient made in the forward pass: no logits are computed twice.

`batch.py` in chunks forgets each chunk's logits and computes them again in the backward pass, a third more products
with the head. Here a chunk's losses and their gradient in its logits are made at once by one kernel, and what is kept
are the gradients in hidden states and head. That is right because the loss is a fixed weighted sum; it leaves no
second derivative, so curvature goes through the plain form.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from sparseforge_core.models.heads import Split
from sparseforge_core.objective.objectives import Losses, Objective
from sparseforge_core.objective.teaching import Full

CHUNK = 2**28
"""Logits of a chunk, of which student and teacher each hold one: 512 MiB in bfloat16."""

ALIGNED = 64
"""Logits of a row are a multiple of this many."""

BLOCK = 4096
"""Logits that a program looks at together."""


def refusal(model: Split, teacher: Split | None, objective: Objective, *, on: str = "cuda") -> str | None:
    """Why these losses are not ones for the kernel, or None. `on` is the kind of device that it runs on."""
    if not model.fused:
        return "a second derivative may be asked for"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    matrices = [part.whole_matrix() for part in (model, teacher) if part is not None]
    if any(matrix is None for matrix in matrices):
        return "a head is more than a matrix"
    if any(matrix is not None and matrix.device.type != on for matrix in matrices):
        return f"a head is not on {on}"
    if any(matrix is not None and type(matrix.data) is not Tensor for matrix in matrices):
        return "a head is sharded"
    if objective.weights is None or (objective.distills and not isinstance(objective.taught, Full)):
        return "the objective is no weighted sum over whole distributions"
    return None


def fused_losses(
    model: Split, teacher: Split | None, objective: Objective, hidden: Tensor, taught: Tensor | None, labels: Tensor
) -> Losses:
    """Losses of hidden states `[positions, width]` that predict `labels`; `taught` are the teacher's hidden states."""
    matrix = model.whole_matrix()
    assert matrix is not None
    assert objective.weights is not None
    task_weight, kl_weight, temperature = objective.weights
    count = len(labels)
    factors = (task_weight / count, temperature**2 * kl_weight / count, 1.0 / temperature)
    theirs = None if teacher is None else teacher.whole_matrix()
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    else:
        dtype = hidden.dtype
    total, task, kl = _Fused.apply(hidden, matrix, taught, theirs, labels, factors, dtype)  # type: ignore[no-untyped-call]
    return Losses(total, task / count, None if teacher is None else temperature**2 * kl / count)


class _Fused(torch.autograd.Function):
    """(hidden, head) to (weighted loss, sum of cross-entropies, sum of divergences); the last two carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, taught: Tensor | None, theirs: Tensor | None, labels: Tensor,
        factors: tuple[float, float, float], dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        from sparseforge_core.objective import fused_kernels as kernels

        count, vocabulary = len(labels), head.shape[0]
        matrix = _aligned(head, dtype)
        other = None if theirs is None else _aligned(theirs, dtype)
        task, kl = hidden.new_zeros(count, dtype=torch.float32), hidden.new_zeros(count, dtype=torch.float32)
        slopes = torch.empty_like(hidden) if hidden.requires_grad or head.requires_grad else None
        head_slope = torch.zeros_like(head) if head.requires_grad else None
        size = max(1, CHUNK // vocabulary)
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, count, size):
                part = slice(begin, begin + size)
                states = hidden[part].to(dtype)
                logits = states @ matrix.t()
                targets = logits if other is None or taught is None else taught[part].to(dtype) @ other.t()
                kernels.losses_and_gradient[(len(states),)](
                    logits, targets, labels[part], task[part], kl[part], logits.stride(0), *factors,
                    VOCABULARY=vocabulary, TAUGHT=other is not None, SAME=factors[2] == 1.0, BLOCK=BLOCK, num_warps=8,
                )  # fmt: skip
                if slopes is not None:
                    slopes[part] = logits @ matrix
                if head_slope is not None:
                    _add_product(head_slope, logits[:, :vocabulary], states)
        ctx.save_for_backward(slopes, head_slope)
        task, kl = task.sum(), kl.sum()
        total = factors[0] * task + factors[1] * kl
        ctx.mark_non_differentiable(task, kl)
        return total, task, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slopes, head_slope = ctx.saved_tensors
        scale = grads[0]
        slopes = None if slopes is None else slopes * scale.to(slopes.dtype)
        head_slope = None if head_slope is None else head_slope * scale.to(head_slope.dtype)
        return slopes, head_slope, None, None, None, None, None


def _aligned(head: Tensor, dtype: torch.dtype) -> Tensor:
    """The head's matrix in `dtype`, rows of zeros added up to a multiple of `ALIGNED`.

    Rows of logits then begin where a GPU's matrix units want them to, which those of a vocabulary of 50,257 do not.
    What is added has logits of exactly zero; the kernel never looks at them, so as slopes they are zero too.
    """
    missing = -len(head) % ALIGNED
    return torch.nn.functional.pad(head.to(dtype), (0, 0, 0, missing)) if missing else head.to(dtype)


def _add_product(total: Tensor, slopes: Tensor, states: Tensor) -> None:
    """total += slopes^T states, added in the precision of `total`."""
    if total.dtype == slopes.dtype:
        total.addmm_(slopes.t(), states)
    elif total.device.type == "cuda":
        torch.addmm(total, slopes.t(), states, out_dtype=total.dtype, out=total)
    else:
        total.add_((slopes.t() @ states).to(total.dtype))
