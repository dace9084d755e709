"""Adam whose momentum a method may redirect before the second moment sees it: the update rule of AST and CAST."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Direct = Callable[[nn.Parameter, Tensor], Tensor | None]
"""(parameter, first moment) -> the direction of its update, or None where the parameter follows plain Adam."""


class DirectedAdam(torch.optim.Optimizer):
    """mu <- b1 mu + (1 - b1) g; u = direct(W, mu); v <- b2 v + (1 - b2) u^2.

    Then W <- (1 - lr wd) W - lr u^ / (sqrt(v^) + eps), with u^ and v^ corrected for their start at zero. The first
    moment sees the task's gradient alone, so that a pressure on pruned entries leaves no trace in it. Where `direct`
    answers None, u is mu and v averages g^2: AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, direct: Direct) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.direct = direct

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        count, (first, second), rate = float(state["step"]), group["betas"], group["lr"]
        mean = state["exp_avg"].mul_(first).add_(gradient, alpha=1.0 - first)
        direction = self.direct(parameter, mean)
        seen = gradient if direction is None else direction
        square = state["exp_avg_sq"].mul_(second).addcmul_(seen, seen, value=1.0 - second)
        scale = (square / (1.0 - second**count)).sqrt_().add_(group["eps"])
        parameter.mul_(1.0 - rate * group["weight_decay"])
        moved = mean if direction is None else direction
        parameter.addcdiv_(moved, scale, value=-rate / (1.0 - first**count))


def regroup(groups: list[dict[str, Any]], chosen: list[nn.Parameter], **changes: Any) -> list[dict[str, Any]]:
    """The same groups with the `chosen` parameters in one of their own, which carries the `changes`."""
    ours = {id(parameter) for parameter in chosen}
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in ours]} for group in groups]
    return [*(group for group in rest if group["params"]), {"params": chosen, **changes}]
