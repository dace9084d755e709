"""What the survivors can do for the pruned: least squares on a layer's inputs, for a mask that is fixed.

Optimal brain surgeon's update for all pruned entries of a row at once. For one output row with target t and support S,
min over w on S of (w - t) H (w - t)^T has the normal equations H_SS w_S = H_S: t; they are solved for all rows together
by conjugate gradients on the support, which needs products with H and nothing of the size of its inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseforge_core.errors import CurvatureUnavailable, NotFinite, RecipeError
from sparseforge_core.specs import spec

TOLERANCE = 1e-6
"""Residual of a row, relative to its first, at which it counts as solved."""


@spec("obs-compensation")
class Compensation:
    """Whether, and on how much text, the survivors make up for what the projection takes away."""

    samples: int = 128
    """Calibration sequences."""
    length: int = 2048
    """Tokens of each; cut to what the model and the corpus allow by the loader."""
    damping: float = 0.01
    """Share of the mean second moment that is added to the diagonal."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 1:
            raise RecipeError(f"samples={self.samples}, length={self.length}: both must be at least 1")
        if self.damping <= 0:
            raise RecipeError(f"damping={self.damping}: must be above 0, or a constant input leaves no solution")


@torch.no_grad()
def compensate(target: Tensor, hard: Tensor, gram: Tensor, *, damping: float = 0.01, limit: int = 300) -> Tensor:
    """The weights on the support of `hard` whose outputs come closest to those of `target`.

    Every iteration lowers the error, so that stopping after `limit` of them is safe; it begins from the target with
    its pruned entries left out.

    Args:
        target: the weights to be imitated, `[..., out, in]`.
        hard: bool, 1 = keep, `[..., out, in]`.
        gram: sum of x x^T over calibration tokens, `[..., in, in]`.
        damping: share of the mean of gram's diagonal that is added to it; inputs never seen then keep their weights.
        limit: iterations at most.

    Raises NotFinite if gram is not finite, CurvatureUnavailable if it is all zero.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    finite = bool(torch.isfinite(gram).all())
    if not finite or not bool((mean > 0).all()):
        trouble = CurvatureUnavailable if finite else NotFinite
        raise trouble("the second moments of a layer's inputs are not finite, or all zero")
    support, extra = hard.to(gram.dtype), damping * mean
    scale = (diagonal + extra).unsqueeze(-2)

    def product(x: Tensor) -> Tensor:
        return (x @ gram + extra.unsqueeze(-2) * x) * support

    w = target.to(gram.dtype) * support
    residual = product(target.to(gram.dtype) - w)
    goal = TOLERANCE * residual.norm(dim=-1, keepdim=True)
    preconditioned = residual / scale
    direction, energy = preconditioned.clone(), (residual * preconditioned).sum(-1, keepdim=True)
    for _ in range(limit):
        if bool((residual.norm(dim=-1, keepdim=True) <= goal).all()):
            break
        image = product(direction)
        bend = (direction * image).sum(-1, keepdim=True)
        # Rows that are solved have no direction left: they stay where they are.
        step = torch.where(bend > 0, energy / bend.clamp_min(torch.finfo(bend.dtype).tiny), torch.zeros_like(bend))
        w += step * direction
        residual -= step * image
        preconditioned = residual / scale
        following = (residual * preconditioned).sum(-1, keepdim=True)
        turn = torch.where(energy > 0, following / energy.clamp_min(torch.finfo(energy.dtype).tiny), following)
        direction = preconditioned + turn * direction
        energy = following
    return w.to(target.dtype)
