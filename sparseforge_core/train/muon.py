"""Muon on the masked matrices, AdamW on the rest: momentum whose singular values are all made one.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), scaled as in arXiv 2502.16982 so that an update has the
root mean square of AdamW's, and one learning rate serves both. `torch.optim.Muon` is the same rule a matrix at a time;
a transformer has hundreds of matrices of few shapes, so here those of one shape are orthogonalised together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
RMS = 0.2
"""Root mean square of an AdamW update in units of the learning rate, as measured in arXiv 2502.16982."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz step: steep at zero, and near one not exact, which costs nothing (Jordan et al.)."""
ROUNDS = 5


class MuonAdam(torch.optim.Optimizer):
    """W <- (1 - lr wd) W - lr 0.2 sqrt(max(out, in)) orthogonal(momentum) for `matrices`; AdamW for `groups`.

    A stack of experts `[experts, out, in]` is that many matrices.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        matrices: list[nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self._adam = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        ours = {"params": matrices, "lr": 0.0, "weight_decay": weight_decay}
        super().__init__([*self._adam.param_groups, ours], {})
        # One state for both rules, so that a checkpoint, or a method that clears moments, sees them all.
        self._adam.state = self.state
        self._shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in matrices:
            self._shapes.setdefault(parameter.shape, []).append(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        self._adam.step()
        group = self.param_groups[-1]
        for shape, parameters in self._shapes.items():
            moving = [p for p in parameters if p.grad is not None]
            if not moving:
                continue
            looks = torch.stack([self._look_ahead(p) for p in moving])
            size = -group["lr"] * RMS * max(shape[-2:]) ** 0.5
            for parameter, direction in zip(moving, orthogonal(looks), strict=True):
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(direction, alpha=size)

    def _look_ahead(self, parameter: nn.Parameter) -> Tensor:
        """Nesterov's momentum: g + mu b after b <- mu b + g."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        moment = state["momentum"].mul_(MOMENTUM).add_(gradient)
        return gradient.add(moment, alpha=MOMENTUM)


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T of `[..., out, in]`, by five Newton-Schulz steps.

    In bfloat16 on a GPU, where the error is far below that of the steps themselves; singular values end near one.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    if y.is_cuda:
        y = y.bfloat16()
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    found: Tensor = y.to(x.dtype)
    return found.mT if tall else found
