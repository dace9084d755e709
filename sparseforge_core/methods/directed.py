"""Adam whose momentum a method may redirect before the second moment sees it: the update rule of AST and CAST."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_core.distributed import part
from sparseforge_core.methods.shards import batched

Direct = Callable[[list[nn.Parameter], list[Tensor]], list[Tensor | None]]
"""(parameters, first moments) -> the direction of each one's update, or None where it follows plain Adam.

Of sharded parameters the moments, and so the directions, are what this rank holds of them.
"""


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
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameters in batched(moving, lambda parameter: part(parameter).numel()):
                self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Many parameters at once: a model has hundreds of small ones, and each line here is a few kernels for all."""
        states = [self._state(parameter) for parameter in parameters]
        first, second = group["betas"]
        rate = group["lr"]
        weights = [part(parameter.detach()) for parameter in parameters]
        gradients = [part(parameter.grad) for parameter in parameters if parameter.grad is not None]
        means, squares = ([part(state[key]) for state in states] for key in ("exp_avg", "exp_avg_sq"))
        counts = [float(state["step"]) for state in states]
        torch._foreach_mul_(means, first)
        torch._foreach_add_(means, gradients, alpha=1.0 - first)
        directions = self.direct(parameters, means)
        seen = [g if u is None else u for g, u in zip(gradients, directions, strict=True)]
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, seen, seen, value=1.0 - second)
        scales = torch._foreach_div(squares, [1.0 - second**count for count in counts])
        torch._foreach_sqrt_(scales)
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_mul_(weights, 1.0 - rate * group["weight_decay"])
        moved = [mean if u is None else u for mean, u in zip(means, directions, strict=True)]
        torch._foreach_addcdiv_(weights, moved, scales, [-rate / (1.0 - first**count) for count in counts])

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What is kept of a parameter, one step on. The count is the host's, which would wait for the device's."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] = state["step"].cpu() + 1  # a checkpoint puts it where the parameter is
        return state


def regroup(groups: list[dict[str, Any]], chosen: list[nn.Parameter], **changes: Any) -> list[dict[str, Any]]:
    """The same groups with the `chosen` parameters in one of their own, which carries the `changes`."""
    ours = {id(parameter) for parameter in chosen}
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in ours]} for group in groups]
    return [*(group for group in rest if group["params"]), {"params": chosen, **changes}]
