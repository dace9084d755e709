"""The one mask mechanism: a parametrization of a weight by a mask, with a straight-through gradient.

`nn.Linear`, GPT-2's `Conv1D` and fused experts are the same thing from here on: a tensor, its orientation, and
`effective = view * weight (+ B P)`. The mask is evaluated inside the block's own forward, so activation
checkpointing recomputes it correctly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparseforge_core.sparsity.patterns import Pattern, check_mask, top_mask
from sparseforge_core.sparsity.slorb import SLoRB, block_means, expand


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
        # Frozen parameters rather than buffers: sharding wrappers then place them exactly like the weight.
        self.mask = nn.Parameter(torch.ones_like(weight), requires_grad=False)
        self.view = nn.Parameter(torch.ones_like(weight), requires_grad=False)
        self.hard = nn.Parameter(torch.ones_like(weight, dtype=torch.bool), requires_grad=False)
        self.law: nn.Module | None = None
        """A method's own way from the weight to the effective weight until the mask is frozen, with its parameters."""
        self.branch: nn.Parameter | None = None
        if slorb is not None:
            matrix = self.matrix(weight)
            block = slorb.block(matrix.shape[-1])
            self.branch = nn.Parameter(torch.zeros_like(block_means(matrix, block)))

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
        if self.branch is not None:
            masked = masked + self.matrix(expand(self.branch, self.matrix(weight).shape[-1]))
        return masked

    @torch.no_grad()
    def set_view(self, softness: float) -> None:
        """view <- x m + (1 - x) m_hat, the quench of section 4.4."""
        torch.lerp(self.hard.to(self.mask.dtype), self.mask, softness, out=self.view.data)

    @torch.no_grad()
    def start_branch(self, weight: Tensor) -> None:
        """B <- block means of what the hard mask prunes; at m = 1 there would be nothing to restore."""
        if self.branch is not None:
            pruned = self.matrix(weight * ~self.hard)
            block = pruned.shape[-1] // self.branch.shape[-1]
            self.branch.copy_(block_means(pruned, block))

    @torch.no_grad()
    def freeze(self, weight: Tensor, pattern: Pattern, where: str) -> None:
        """Fix the hard mask for good: check it, zero the pruned weights, and mask their gradients from now on."""
        check_mask(self.matrix(self.hard), pattern, where)
        self.mask.copy_(self.hard)
        self.view.copy_(self.hard)
        # where() rather than a product: a pruned weight becomes +0, never -0.
        weight.copy_(torch.where(self.hard, weight, torch.zeros_like(weight)))
        self.frozen = True

    @torch.no_grad()
    def harden(self, scores: Tensor, pattern: Pattern) -> None:
        """hard <- the top entries of `scores` (in the weight's layout)."""
        self.matrix(self.hard).copy_(top_mask(self.matrix(scores), pattern))


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
def squash(module: nn.Module, parameter: str) -> Tensor | None:
    """Take the mask off, leave the pruned weight in place, and return the side branch B, if there is one.

    The state-dict keys are the original ones again. Raises nothing: call it after `SoftMask.freeze`.
    """
    soft: SoftMask = module.parametrizations[parameter][0]  # type: ignore[index,union-attr,assignment]
    branch = soft.branch
    soft.branch = None
    parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
    return None if branch is None else branch.detach()
