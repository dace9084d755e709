"""The one mask mechanism: a parametrization of a weight by a mask, with a straight-through gradient.

`nn.Linear`, GPT-2's `Conv1D` and fused experts are the same thing from here on: a tensor, its orientation, and
`effective = view * weight (+ B P)`. The mask is evaluated inside the block's own forward, so activation
checkpointing recomputes it correctly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparseforge_core.sparsity.gate import quench_view
from sparseforge_core.sparsity.patterns import Pattern, check_mask, top_mask
from sparseforge_core.sparsity.slorb import BranchCost, SLoRB, block_means, cost, expand, indicator


class StraightThrough(torch.autograd.Function):
    """view * weight forward, identity backward: the gradient of a masked entry is that of the effective weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, view: Tensor) -> Tensor:
        return weight * view

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class SoftMask(nn.Module):
    """State of the mask of one weight, in the weight's own layout.

    `mask` is the annealed state m in [0, 1]; `hard` the current hard mask; `view` what the forward multiplies
    by. State and view are two things: writing a quenched view back into m would compound it at every update.
    """

    mask: Tensor
    hard: Tensor
    view: Tensor

    def __init__(self, weight: Tensor, *, transposed: bool, slorb: SLoRB | None) -> None:
        super().__init__()
        self.transposed = transposed
        self.frozen = False
        self.slorb = slorb
        # Frozen parameters rather than buffers: sharding wrappers then place them exactly like the weight.
        self.mask = nn.Parameter(torch.ones_like(weight), requires_grad=False)
        self.view = nn.Parameter(torch.ones_like(weight), requires_grad=False)
        self.hard = nn.Parameter(torch.ones_like(weight, dtype=torch.bool), requires_grad=False)
        self.law: nn.Module | None = None
        """A method's own way from the weight to the effective weight until the mask is frozen, with its parameters."""
        self.branch: nn.Parameter | None = None
        self.projection: nn.Parameter | None = None
        self.branch_on = slorb is not None and slorb.begin == "start"
        if slorb is not None:
            matrix = self.matrix(weight)
            inputs = matrix.shape[-1]
            blocks = inputs // slorb.block(inputs)
            self.branch = nn.Parameter(matrix.new_zeros(*matrix.shape[:-1], blocks))
            if slorb.projection == "trained":
                start = indicator(blocks, inputs, matrix).expand(*matrix.shape[:-2], blocks, inputs)
                self.projection = nn.Parameter(start.clone())

    def matrix(self, x: Tensor) -> Tensor:
        """A tensor of the weight's layout as `[..., out, in]` (a view)."""
        return x.transpose(-1, -2) if self.transposed else x

    def forward(self, weight: Tensor) -> Tensor:
        masked: Tensor
        if self.frozen:
            masked = weight * self.view
        elif self.law is not None:
            masked = self.law(weight)
        else:
            masked = StraightThrough.apply(weight, self.view)  # type: ignore[no-untyped-call]
        if self.branch is not None and self.branch_on:
            inputs = self.matrix(weight).shape[-1]
            masked = masked + self.matrix(expand(self.branch, inputs, self.projection))
        return masked

    @torch.no_grad()
    def set_view(
        self, softness: float, *, hard: Literal["top-n", "threshold"] = "top-n", keep_norm_of: Tensor | None = None
    ) -> None:
        """view <- x m + (1 - x) m_hat, the quench of section 4.4.

        Args:
            softness: x.
            hard: what the view hardens to: the top N of each group, or 1[m > 1/2] as the section prints it, which
                satisfies no pattern before the final projection.
            keep_norm_of: the weight, where each output row of the effective weight is to keep the norm that the row
                has without a mask; the factor becomes part of the view.
        """
        target = self.hard if hard == "top-n" else self.mask > 0.5
        self.view.copy_(quench_view(self.mask, target, softness))
        if keep_norm_of is not None:
            rows = self.matrix(keep_norm_of)
            left = (self.matrix(self.view) * rows).norm(dim=-1, keepdim=True)
            factor = rows.norm(dim=-1, keepdim=True) / left.clamp_min(torch.finfo(left.dtype).tiny)
            self.matrix(self.view).mul_(torch.where(left > 0, factor, torch.ones_like(factor)))

    @torch.no_grad()
    def start_branch(self, weight: Tensor) -> None:
        """Fit B to what the hard mask prunes, and switch the branch on, unless it trains from the start."""
        if self.branch is None or self.slorb is None or self.slorb.begin == "start":
            return
        pruned = self.matrix(weight * ~self.hard)
        block = pruned.shape[-1] // self.branch.shape[-1]
        self.branch.copy_(block_means(pruned, block) * (1 if self.slorb.fit == "mean" else block))
        self.branch_on = True

    @torch.no_grad()
    def freeze(self, weight: Tensor, pattern: Pattern, where: str, *, rows_rescaled: bool = False) -> None:
        """Fix the hard mask for good: check it, zero the pruned weights, and mask their gradients from now on.

        With `rows_rescaled` the factor that the view gives each row becomes part of the weight.
        """
        check_mask(self.matrix(self.hard), pattern, where)
        kept = weight * self.view if rows_rescaled else weight
        # where() rather than a product: a pruned weight becomes +0, never -0.
        weight.copy_(torch.where(self.hard, kept, torch.zeros_like(weight)))
        self.mask.copy_(self.hard)
        self.view.copy_(self.hard)
        self.frozen = True

    @torch.no_grad()
    def harden(self, scores: Tensor, pattern: Pattern) -> None:
        """hard <- the top entries of `scores` (in the weight's layout)."""
        self.matrix(self.hard).copy_(top_mask(self.matrix(scores), pattern))


@dataclass(frozen=True)
class Branch:
    """The trained side branch of one site: B `[..., out, r]`, and P `[..., r, in]` where it was trained."""

    values: Tensor
    projection: Tensor | None
    inputs: int

    @property
    def cost(self) -> BranchCost:
        """What it adds at inference."""
        return cost(self.values, self.projection, self.inputs)


def attach(module: nn.Module, parameter: str, *, transposed: bool, slorb: SLoRB | None = None) -> SoftMask:
    """Put a mask of ones on `module.parameter`; the model's outputs do not change."""
    weight = getattr(module, parameter)
    soft = SoftMask(weight.detach(), transposed=transposed, slorb=slorb).to(weight.device)
    parametrize.register_parametrization(module, parameter, soft, unsafe=True)
    return soft


def original(module: nn.Module, parameter: str) -> nn.Parameter:
    """The trained tensor behind the mask."""
    weight = module.parametrizations[parameter].original  # type: ignore[index,union-attr]
    assert isinstance(weight, nn.Parameter)
    return weight


@torch.no_grad()
def squash(module: nn.Module, parameter: str) -> Branch | None:
    """Take the mask off, leave the pruned weight in place, and return the side branch, if there is one.

    The state-dict keys are the original ones again. Raises nothing: call it after `SoftMask.freeze`.
    """
    soft: SoftMask = module.parametrizations[parameter][0]  # type: ignore[index,union-attr,assignment]
    branch, projection = soft.branch, soft.projection
    inputs = soft.matrix(soft.mask).shape[-1]
    soft.branch = soft.projection = None
    parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
    if branch is None:
        return None
    return Branch(branch.detach(), None if projection is None else projection.detach(), inputs)
