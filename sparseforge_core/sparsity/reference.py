"""Algorithm 1's mask update once more, in float64 NumPy, one group at a time: what the fast path is checked against.

Nothing here is shared with `gate.py` and `patterns.py`; it is written from the equations to be read beside them, and
it is slow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What is annealed, at one update, and how the text is read (`gate.GateForm` has the same words)."""

    temperature: float
    structure_mix: float
    mid_push: float
    mask_rate: float
    threshold: str = "midpoint"
    order: str = "blend-then-push"
    push_target: str = "scores"


Known = tuple[float, float]
"""Mean of a layer's scores, and standard deviation of these or of their logarithms, at an earlier update."""


def standard_scores(scores: Array, *, log: bool, known: Known | None = None) -> Array:
    """s~ = (s - mean) / (std + eps) over the layer (section 4.1), of the scores or of their logarithm."""
    s = _raised(scores, log, known)
    return np.asarray((s - s.mean()) / ((s.std() if known is None else known[1]) + 1e-6))


def known_of(scores: Array, *, log: bool, known: Known | None = None) -> Known:
    """What the next update standardises by, from the scores of one that was standardised by `known`."""
    return float(np.mean(scores)), float(_raised(scores, log, known).std())


def _raised(scores: Array, log: bool, known: Known | None) -> Array:
    s = np.asarray(scores, dtype=np.float64)
    return np.asarray(np.log(s + 1e-10 * (s.mean() if known is None else known[0]) + 1e-38)) if log else s


def top(values: Array, keep: int, ties: Array | None = None) -> Array:
    """1 for the `keep` largest of one group, else 0; equal ones by `ties`, then the earlier one first."""
    others = np.zeros_like(values) if ties is None else ties
    order = sorted(range(len(values)), key=lambda i: (-values[i], -others[i], i))
    chosen = np.zeros_like(values)
    chosen[order[:keep]] = 1.0
    return chosen


def tau_of(z: Array, keep: int, at: Constants) -> float:
    """tau of one group (eq. 3): the N-th largest score, midway to the next, or where the gates add up to N."""
    falling = np.sort(z)[::-1]
    if at.threshold == "nth":
        return float(falling[keep - 1])
    if at.threshold == "midpoint":
        return float(0.5 * (falling[keep - 1] + falling[keep]))
    low, high = z.min() - 50.0 * at.temperature, z.max() + 50.0 * at.temperature
    for _ in range(200):
        tau = 0.5 * (low + high)
        low, high = (tau, high) if gate_of(z, tau, at.temperature).sum() > keep else (low, tau)
    return float(0.5 * (low + high))


def gate_of(z: Array, tau: float, temperature: float) -> Array:
    """G = sigmoid((z - tau) / T) (eq. 3)."""
    return np.asarray(1.0 / (1.0 + np.exp(-(z - tau) / temperature)))


def update_group(m: Array, z: Array, target: Array, keep: int, at: Constants) -> Array:
    """The new mask of one group, from the old one, its scores and its hard target: lines 9 to 12."""
    gate = gate_of(z, tau_of(z, keep, at), at.temperature)  # eq. (3)
    if at.order == "blend-then-push":
        gate = (1.0 - at.structure_mix) * gate + at.structure_mix * target  # section 4.3
    pull = target if at.push_target == "scores" else top(gate, keep)
    pushed = np.clip(gate - at.mid_push * (m - pull), 0.0, 1.0)  # eq. (4)
    return np.asarray((1.0 - at.mask_rate) * m + at.mask_rate * pushed)  # eq. (5)


def anneal(
    grouped_scores: list[Any], keep: int, constants: list[Constants], *, log: bool, by_the_last: bool = False
) -> tuple[Array, Array]:
    """(m, m_hat) `[groups, size]` after one update for each array of scores, from masks of one (line 1).

    The scores are a layer's, already cut into groups; they may change from update to update. With `by_the_last` each
    update but the first is standardised by the statistics of the one before it.
    """
    known: Known | None = None
    m = np.ones_like(np.asarray(grouped_scores[0], dtype=np.float64))
    hard = np.ones_like(m)
    for scores, at in zip(grouped_scores, constants, strict=True):
        s = np.asarray(scores, dtype=np.float64)
        z = standard_scores(s, log=log, known=known)
        known = known_of(s, log=log, known=known) if by_the_last else None
        for g in range(len(m)):
            m[g] = update_group(m[g], z[g], top(z[g], keep), keep, at)
            hard[g] = top(m[g], keep, z[g])
    return m, hard
