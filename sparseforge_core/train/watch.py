"""Whether every step was finite, without asking the device at each.

Where the update rule can be told by the device to change nothing (fused AdamW on a GPU), a step whose loss or gradient
norm is not finite, and every step after it, leaves weights and moments as they are; the host learns of it at its next
look, which comes every few steps and before anything is written. Elsewhere the host looks at every step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparseforge_core.errors import Diverged
from sparseforge_core.sparsity.arriving import Arriving

LOOK_EVERY = 8
"""Steps between two looks of a host that runs ahead of its device."""


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the device alone can keep a step of this optimizer from changing anything."""
    return type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in optimizer.param_groups)


class Watch:
    """The first step that was not finite, known to the device at once."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, *, deferred: bool | None = None) -> None:
        """`deferred` says whether the host may look later than at each step; None: where that saves waiting."""
        self.optimizer = optimizer
        self.deferred = (device.type == "cuda" and can_skip(optimizer)) if deferred is None else deferred
        self.loss = math.nan
        """The loss as last read."""
        # First bad step (0: none), its loss and norm, and the last step's loss.
        self._state = torch.zeros(4, dtype=torch.float64, device=device)
        self._arriving: Arriving | None = None

    def refuse_loss(self, loss: Tensor, step: int) -> None:
        """Before a backward pass: raise Diverged on a loss that is not finite, unless that is found out later."""
        if not self.deferred and not bool(torch.isfinite(loss)):
            raise _bad_loss(step, float(loss.detach()))

    @torch.no_grad()
    def before_update(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Before the optimizer's step: refuse one that is not finite, or see to it that it changes nothing."""
        if not self.deferred:
            self.loss = float(loss)
            if not math.isfinite(float(norm)):
                raise _bad_norm(step, float(norm))
            return
        now = torch.stack([torch.full_like(loss, step), loss, norm.to(loss.dtype), loss])
        good = torch.isfinite(now).all() | (self._state[0] > 0)
        kept = self._state.clone()
        kept[3] = loss
        self._state = torch.where(good, kept, now)
        self.optimizer.found_inf = (self._state[0] > 0).float()  # type: ignore[attr-defined]

    def after_update(self, step: int) -> None:
        """After it: every few steps, look at what was on its way since the last look. Raises Diverged."""
        if self.deferred and step % LOOK_EVERY == 0:
            if self._arriving is not None:
                self._look(self._arriving)
            self._arriving = Arriving(self._state)

    def check(self) -> None:
        """Look now, waiting for the device. Raises Diverged, naming the first step that was not finite."""
        if self.deferred:
            self._arriving = None
            self._look(Arriving(self._state))

    def _look(self, arrived: Arriving) -> None:
        step, loss, norm, last = arrived.read()
        self.loss = last
        if step:
            raise _bad_loss(int(step), loss) if not math.isfinite(loss) else _bad_norm(int(step), norm)


def _bad_loss(step: int, loss: float) -> Diverged:
    return Diverged(f"step {step}: the loss is {loss}; nothing of this step was kept")


def _bad_norm(step: int, norm: float) -> Diverged:
    return Diverged(f"step {step}: the gradient norm is {norm}; nothing of this step was kept. Lower the learning rate")
