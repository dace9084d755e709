"""One mask update, eqs. (3)-(5): scores in, masks out. All tensors are grouped, `[..., tiles, size]`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparseforge_core.sparsity.patterns import SMALL, columns_of, keep_top, ranks

Threshold = Literal["midpoint", "nth", "exact-sum"]
Scope = Literal["group", "layer"]
Order = Literal["blend-then-push", "push-only"]
PushTarget = Literal["scores", "gate"]

BISECTIONS = 40
"""Halvings of the interval of tau for 'exact-sum': more than float32 can tell apart."""


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


@dataclass(frozen=True, kw_only=True)
class GateForm:
    """Where the paper's text leaves the update open: which reading is meant."""

    threshold: Threshold = "midpoint"
    scope: Scope = "group"
    order: Order = "blend-then-push"
    push_target: PushTarget = "scores"


def threshold(z: Tensor, keep: int, mode: Threshold, temperature: float = 1.0) -> Tensor:
    """tau of each group, `[..., tiles, 1]`.

    'nth' is the N-th largest score, eq. (3) to the letter: that survivor then sits exactly at 0.5. 'midpoint'
    lies halfway to the next score, so that the N survivors are above 0.5 and the others below. 'exact-sum' is the
    tau at which the gates of a group add up to N at this temperature.
    """
    if mode == "exact-sum":
        return _exact_sum(z, keep, temperature)
    nth, following = order_statistics(z, keep)
    return nth if mode == "nth" else 0.5 * (nth + following)


def order_statistics(z: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The N-th largest entry of each group and the next, each `[..., tiles, 1]`."""
    size = z.shape[-1]
    if size > SMALL:
        top = z.topk(keep + 1, dim=-1).values
        return top[..., keep - 1 : keep], top[..., keep:]
    columns = list(columns_of(z))
    # Bubbling the largest of what is left to the front, N + 1 times: whole columns, no sort of tiny rows.
    for front in range(keep + 1):
        for j in range(size - 1, front, -1):
            larger = torch.maximum(columns[j - 1], columns[j])
            columns[j] = torch.minimum(columns[j - 1], columns[j])
            columns[j - 1] = larger
    return columns[keep - 1].unsqueeze(-1), columns[keep].unsqueeze(-1)


def layer_threshold(z: Tensor, keep: int, mode: Threshold, temperature: float = 1.0) -> Tensor:
    """tau of the whole matrix, `[..., 1, 1]`: `threshold` with all entries in one group.

    What the published code gates by. Groups then compete with each other, and most of them keep another number of
    entries than the pattern says until the blend or the quench makes them.
    """
    tiles = z.shape[-2]
    return threshold(z.flatten(-2).unsqueeze(-2), keep * tiles, mode, temperature).view(*z.shape[:-2], 1, 1)


def _exact_sum(z: Tensor, keep: int, temperature: float) -> Tensor:
    # At the lower end every gate is at least size / (size + 1), at the upper at most 1 / (size + 1): this brackets N.
    margin = temperature * math.log(z.shape[-1])
    low, high = z.amin(-1, keepdim=True) - margin, z.amax(-1, keepdim=True) + margin
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        too_many = torch.sigmoid((z - middle) / temperature).sum(-1, keepdim=True) > keep
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return 0.5 * (low + high)


def soft_gate(z: Tensor, keep: int, temperature: float, mode: Threshold, scope: Scope = "group") -> Tensor:
    """G = sigmoid((z - tau) / T), eq. (3); tau of each group, or of the whole layer."""
    tau = (threshold if scope == "group" else layer_threshold)(z, keep, mode, temperature)
    return torch.sigmoid((z - tau) / temperature)


def blend(gate: Tensor, target: Tensor, structure_mix: float) -> Tensor:
    """G <- (1 - beta) G + beta G_bar (section 4.3, algorithm 1 line 10)."""
    return torch.lerp(gate, target, structure_mix)


def push_apart(gate: Tensor, mask: Tensor, target: Tensor, mid_push: float) -> Tensor:
    """G~ = clamp(G - kappa (m - G_bar), 0, 1), eq. (4), line 11."""
    return (gate - mid_push * (mask - target)).clamp(0.0, 1.0)


def hard_target(z: Tensor, keep: int, previous: Tensor | None = None, margin: float = 0.0) -> Tensor:
    """G_bar = TopK_N(z), eq. (3); with hysteresis, a challenger must beat a kept entry by `margin`."""
    if previous is not None and margin > 0.0:
        z = z + margin * previous
    return keep_top(z, keep)


def update_mask(mask: Tensor, z: Tensor, target: Tensor, keep: int, at: AnnealPoint, form: GateForm) -> Tensor:
    """m <- (1 - alpha) m + alpha G~, eq. (5), from the old mask, the standardised scores and the hard target.

    Line 10 of algorithm 1 blends the gate and line 11 starts again from the gate before the blend; section 4.3 blends
    first and lets eq. (4) act on the result. The default follows 4.3; 'push-only' is line 11 to the letter, which
    leaves the blend without effect.
    """
    hard = target.to(mask.dtype)
    gate = soft_gate(z, keep, at.temperature, form.threshold, form.scope)  # line 9, eq. (3)
    if form.order == "blend-then-push":
        gate = blend(gate, hard, at.structure_mix)  # line 10, section 4.3
    pull = hard if form.push_target == "scores" else keep_top(gate, keep).to(mask.dtype)
    pushed = push_apart(gate, mask, pull, at.mid_push)  # line 11, eq. (4)
    return torch.lerp(mask, pushed, at.mask_rate)  # line 12, eq. (5)


def project(mask: Tensor, z: Tensor, keep: int) -> Tensor:
    """m_hat = TopN(m) of each group; equal masks (all ones, saturated) are told apart by the scores, then by place."""
    return ranks(mask, z) < keep


def quench_view(mask: Tensor, hard: Tensor, softness: float | Tensor) -> Tensor:
    """m_eff = x m + (1 - x) m_hat (section 4.4): what the forward sees while x falls from 1 to 0."""
    return torch.lerp(hard.to(mask.dtype), mask, softness)
