"""One mask update, eqs. (3)-(5): scores in, masks out. All tensors are grouped, `[..., tiles, size]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparseforge_core.sparsity.patterns import SMALL, keep_top, ranks

Threshold = Literal["midpoint", "nth"]


@dataclass(frozen=True, kw_only=True)
class AnnealPoint:
    """The annealed constants at one moment."""

    temperature: float
    """T: how sharply the gate separates scores."""
    structure_mix: float
    """beta: share of the hard target in the gate."""
    mid_push: float
    """kappa = eta_pen * lambda_mid: pull of the mask towards the hard target."""
    mask_rate: float
    """alpha: step of the moving average."""


def threshold(z: Tensor, keep: int, mode: Threshold) -> Tensor:
    """tau of each group, `[..., tiles, 1]`.

    'nth' is the N-th largest score, eq. (3) to the letter: that survivor then sits exactly at 0.5. 'midpoint'
    lies halfway to the next score, so that the N survivors are above 0.5 and the others below.
    """
    place = ranks(z)
    nth = _at_rank(z, place, keep - 1)
    return nth if mode == "nth" else 0.5 * (nth + _at_rank(z, place, keep))


def _at_rank(z: Tensor, place: Tensor, rank: int) -> Tensor:
    """The entry of each group that has this rank, `[..., tiles, 1]`; exactly one has."""
    if z.shape[-1] > SMALL:
        return (z * (place == rank)).sum(-1, keepdim=True)
    entry = torch.zeros_like(z[..., 0])
    for column, at in zip(z.unbind(-1), place.unbind(-1), strict=True):
        entry = torch.where(at == rank, column, entry)
    return entry.unsqueeze(-1)


def soft_gate(z: Tensor, keep: int, temperature: float, mode: Threshold) -> Tensor:
    """G = sigmoid((z - tau) / T), eq. (3)."""
    return torch.sigmoid((z - threshold(z, keep, mode)) / temperature)


def blend(gate: Tensor, target: Tensor, structure_mix: float) -> Tensor:
    """G <- (1 - beta) G + beta G_bar (section 4.3, algorithm 1 line 10)."""
    return torch.lerp(gate, target, structure_mix)


def push_apart(gate: Tensor, mask: Tensor, target: Tensor, mid_push: float) -> Tensor:
    """G~ = clamp(G - kappa (m - G_bar), 0, 1), eq. (4), line 11, on the blended gate."""
    return (gate - mid_push * (mask - target)).clamp(0.0, 1.0)


def hard_target(z: Tensor, keep: int, previous: Tensor | None = None, margin: float = 0.0) -> Tensor:
    """G_bar = TopK_N(z), eq. (3); with hysteresis, a challenger must beat a kept entry by `margin`."""
    if previous is not None and margin > 0.0:
        z = z + margin * previous
    return keep_top(z, keep)


def update_mask(mask: Tensor, z: Tensor, target: Tensor, keep: int, at: AnnealPoint, mode: Threshold) -> Tensor:
    """m <- (1 - alpha) m + alpha G~, eq. (5), from the old mask, the standardised scores and the hard target."""
    hard = target.to(mask.dtype)
    gate = blend(soft_gate(z, keep, at.temperature, mode), hard, at.structure_mix)
    return torch.lerp(mask, push_apart(gate, mask, hard, at.mid_push), at.mask_rate)


def project(mask: Tensor, z: Tensor, keep: int) -> Tensor:
    """m_hat = TopN(m) of each group; equal masks (all ones, saturated) are told apart by the scores."""
    return keep_top(mask + 1e-6 * torch.sigmoid(z), keep)


def quench_view(mask: Tensor, hard: Tensor, softness: float) -> Tensor:
    """m_eff = x m + (1 - x) m_hat (section 4.4): what the forward sees while x falls from 1 to 0."""
    return torch.lerp(hard.to(mask.dtype), mask, softness)
