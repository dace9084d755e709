"""Second-order pruning of one matrix: the inverse-Hessian factor, and SparseGPT's column sweep (arXiv 2301.00774)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseforge_core.errors import CurvatureUnavailable
from sparseforge_core.sparsity.patterns import GroupPattern, Pattern, Unstructured, keep_top, top_mask

RAISES = 3
"""How often a damping that leaves the Hessian indefinite is raised tenfold before the matrix is given up."""


@dataclass(frozen=True)
class Factor:
    """U, the upper Cholesky factor of the damped inverse Hessian, float32 `[in, in]`, and how it was had."""

    upper: Tensor
    damping: float
    """The damping that was used, as a share of the mean diagonal."""
    dead: Tensor
    """Inputs that are always zero, bool `[in]`: their weights say nothing."""


def inverse_factor(hessian: Tensor, damping: float, where: str) -> Factor:
    """U with U^T U = (H + damping mean(diag H) I)^-1, dead inputs given a diagonal of 1 first.

    All in float64: in float32 the inverse of a damped Hessian with a few dominant inputs has lost the digits that
    decide close choices. Where the matrix is not positive definite the damping is raised tenfold, up to three times.
    Raises CurvatureUnavailable, naming `where`, if that does not help.
    """
    dead = hessian.diagonal() == 0
    for attempt in range(RAISES + 1):
        share = damping * 10.0**attempt
        h = hessian.to(torch.float64, copy=True)
        diagonal = h.diagonal()
        diagonal[dead] = 1.0
        diagonal += share * diagonal.mean()
        upper = _upper_of_inverse(h)
        if upper is not None:
            return Factor(upper.float(), share, dead)
    raise CurvatureUnavailable(
        f"{where}: the Hessian of its inputs is not positive definite even with {share:g} of its mean diagonal added; "
        "give it more calibration samples, or a larger damping"
    )


def _upper_of_inverse(h: Tensor) -> Tensor | None:
    """The upper Cholesky factor of h^-1, or None where h or its computed inverse is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(h)
    if int(info) or not bool(torch.isfinite(lower).all()):
        return None
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(info) or not bool(torch.isfinite(upper).all()) else upper


def sweep(weight: Tensor, factor: Factor, pattern: Pattern, width: int) -> tuple[Tensor, Tensor]:
    """Prune `weight` `[out, in]` column by column; returns the updated weight and its keep mask (bool).

    At the first column of each run of columns that compete, the survivors are chosen by w^2 / U_jj^2 on the weights as
    updated so far; each pruned entry's error e = w / U_jj then moves the columns to its right, w <- w - e U_j. Columns
    beyond the present `width` are moved once a block, by one product.
    """
    w = weight.float().clone()
    w[:, factor.dead] = 0.0
    keep = torch.ones_like(w, dtype=torch.bool)
    for begin, end in blocks(w.shape[1], pattern, width):
        upper = factor.upper[begin:end]
        errors = _sweep_block(w, keep, upper[:, begin:end], pattern, begin, end)
        w[:, end:].addmm_(errors.T, upper[:, end:], alpha=-1.0)
    return w, keep


def _sweep_block(w: Tensor, keep: Tensor, upper: Tensor, pattern: Pattern, begin: int, end: int) -> Tensor:
    """Columns `begin` to `end` of w and keep, in place; returns their errors, `[end - begin, out]`."""
    columns = w[:, begin:end].T.contiguous()  # rows of memory: each step touches whole ones
    kept = torch.empty_like(columns, dtype=torch.bool)
    scale = upper.diagonal()
    inverse = (1.0 / scale).tolist()
    errors = torch.empty_like(columns)
    run = pattern.cols if isinstance(pattern, GroupPattern) else end - begin
    for j in range(end - begin):
        if j % run == 0:
            scores = (columns[j : j + run] / scale[j : j + run, None]).square().T
            kept[j : j + run] = survivors(scores, pattern, begin + j, w.shape[1]).T
        column = columns[j]
        torch.mul(column, ~kept[j], out=errors[j]).mul_(inverse[j])
        columns[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1.0)
        column.mul_(kept[j])
    w[:, begin:end] = torch.where(kept, columns, torch.zeros_like(columns)).T
    keep[:, begin:end] = kept.T
    return errors


def blocks(inputs: int, pattern: Pattern, width: int) -> list[tuple[int, int]]:
    """Cuts of the columns into blocks of about `width` in which no group is cut."""
    if isinstance(pattern, GroupPattern):
        width = max(1, width // pattern.cols) * pattern.cols
    return [(begin, min(begin + width, inputs)) for begin in range(0, inputs, width)]


def survivors(scores: Tensor, pattern: Pattern, begin: int, inputs: int) -> Tensor:
    """Keep mask of the columns `begin` ... of a matrix with `inputs` columns, by their scores `[out, columns]`.

    Unstructured sparsity takes its share of every block of columns; the shares add up to the pattern's count exactly.
    """
    if not isinstance(pattern, Unstructured):
        return top_mask(scores, pattern)
    rows = 1 if pattern.scope == "row" else scores.shape[0]
    done, now = (pattern.keep_of(rows * inputs) * at // inputs for at in (begin, begin + scores.shape[1]))
    grouped = scores if pattern.scope == "row" else scores.reshape(1, -1)
    return keep_top(grouped, now - done).reshape(scores.shape)


def tenfold_raises(used: float, asked: float) -> int:
    """How often a damping was raised."""
    return next(times for times in itertools.count() if used <= asked * 10.0**times * 1.5)
