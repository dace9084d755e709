"""ALPS on one matrix: ADMM finds the support, conjugate gradients the weights on it (arXiv 2406.07831).

The problem is min_W || (W - W^) X ||^2 with W in the pattern, in terms of H = X X^T. All in float64, rows as in the
weight `[out, in]`; inputs are first scaled to unit diagonal of H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseforge_core.errors import CurvatureUnavailable
from sparseforge_core.sparsity.patterns import Pattern, top_mask

CHECK_EVERY = 3
"""Iterations between updates of the penalty."""
AGREED = 1e-3
"""W and D are one when they differ by less than this share of W: a support that rests earlier may still move."""


@dataclass(frozen=True)
class Spectrum:
    """H scaled to unit diagonal and damped, with its eigenvectors: what every weight with these inputs needs."""

    hessian: Tensor
    values: Tensor
    vectors: Tensor
    scale: Tensor
    """Root of the diagonal of H, `[in]`; 1 at dead inputs."""
    dead: Tensor


def spectrum(hessian: Tensor, damping: float, where: str) -> Spectrum:
    """Decompose H `[in, in]`. Raises CurvatureUnavailable, naming `where`, if its eigenvalues cannot be found."""
    h = hessian.double()
    dead = h.diagonal() == 0
    h = h + torch.diag(dead.to(h.dtype))
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    scale = h.diagonal().sqrt()
    h = h / scale / scale[:, None]
    try:
        values, vectors = torch.linalg.eigh(h)
    except RuntimeError as error:
        raise CurvatureUnavailable(f"{where}: the Hessian of its inputs has no eigenvalues: {error}") from error
    return Spectrum(h, values, vectors, scale, dead)


def prune(
    weight: Tensor, about: Spectrum, pattern: Pattern, *, penalty: float, iterations: int, refinements: int
) -> tuple[Tensor, Tensor]:
    """The weight in the pattern that rebuilds the outputs best, as found; and its keep mask (bool), `[out, in]`."""
    target = weight.double() * ~about.dead * about.scale
    # Groups compete by what they hold in scaled coordinates; zero patterns are the same in both.
    keep = _support(target, about, pattern, penalty, iterations)
    solved = on_support(target, about.hessian, keep, refinements)
    return (solved / about.scale).to(weight.dtype), keep


def _support(target: Tensor, about: Spectrum, pattern: Pattern, penalty: float, iterations: int) -> Tensor:
    """ADMM with W = D: W minimises, D is in the pattern, V is the dual; the penalty rises until both agree.

    W <- (H W^ - V + rho D)(H + rho I)^-1; D <- P(W + V / rho); V <- V + rho (W - D). Every third iteration rho grows
    by 1.3, 1.2 or 1.1 as the share of kept entries that moved is at least a tenth, at least half a percent, or less.
    """
    rho = penalty
    pulled = target @ about.hessian
    dual = torch.zeros_like(target)
    mask = top_mask(target.abs(), pattern)
    sparse = target * mask
    checked, kept = mask, int(mask.sum())
    for iteration in range(1, iterations + 1):
        right = (pulled - dual + rho * sparse) @ about.vectors
        dense = (right / (about.values + rho)) @ about.vectors.T
        moved = dense + dual / rho
        mask = top_mask(moved.abs(), pattern)
        sparse = moved * mask
        dual = dual + rho * (dense - sparse)
        if iteration % CHECK_EVERY == 0:
            changed = int((mask ^ checked).sum()) / 2
            if changed == 0 and float((dense - sparse).norm()) <= AGREED * float(dense.norm()):
                break
            rho *= 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
            checked = mask
    return mask


def on_support(target: Tensor, hessian: Tensor, keep: Tensor, iterations: int) -> Tensor:
    """min (W - W^) H (W - W^)^T over W that is zero outside `keep`, by projected conjugate gradients from W^ * keep.

    Every row is its own problem with its own support; all take their steps at once. The preconditioner is the diagonal
    of H, which is one here.
    """
    solved = target * keep
    residual = ((target - solved) @ hessian) * keep
    direction = residual
    energy = residual.square().sum(-1, keepdim=True)
    tiny = torch.finfo(energy.dtype).tiny
    for _ in range(iterations):
        carried = (direction @ hessian) * keep
        step = energy / (direction * carried).sum(-1, keepdim=True).clamp_min(tiny)
        step = torch.where(energy > tiny, step, torch.zeros_like(step))
        solved = solved + step * direction
        residual = residual - step * carried
        after = residual.square().sum(-1, keepdim=True)
        direction = residual + after / energy.clamp_min(tiny) * direction
        energy = after
    return solved


def reconstruction_error(weight: Tensor, target: Tensor, hessian: Tensor) -> float:
    """tr (W - W^) H (W - W^)^T, the squared error of the layer's outputs."""
    gap = (weight - target).double()
    return float(((gap @ hessian.double()) * gap).sum())
