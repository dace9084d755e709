"""The one mask mechanism: a parametrization of a weight by a mask, with a straight-through gradient.

`nn.Linear`, GPT-2's `Conv1D` and fused experts are the same thing from here on: a tensor, its orientation, and
`effective = view * weight (+ B P)`. The mask is evaluated inside the block's own forward, so activation
checkpointing recomputes it correctly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparseforge_core.errors import RecipeError
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


Storage = Literal["float32", "int16"]
"""How m is kept: m, hard mask and view apart (9 bytes an entry), or all in 16 bits (`PackedMask`)."""


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
        self._keep_ones(weight)
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

    def _keep_ones(self, weight: Tensor) -> None:
        """Make the state of a mask of ones."""
        # Frozen parameters rather than buffers: sharding wrappers then place them exactly like the weight.
        self.mask = nn.Parameter(torch.ones_like(weight), requires_grad=False)
        self.view = nn.Parameter(torch.ones_like(weight), requires_grad=False)
        self.hard = nn.Parameter(torch.ones_like(weight, dtype=torch.bool), requires_grad=False)

    def matrix(self, x: Tensor) -> Tensor:
        """A tensor of the weight's layout as `[..., out, in]` (a view)."""
        return x.transpose(-1, -2) if self.transposed else x

    def stored(self) -> list[Tensor]:
        """What kernels read and write for mask, hard mask and view; one tensor thrice where they are kept together."""
        return [self.mask, self.hard.data.view(torch.int8), self.view]

    def rounded(self, mask: Tensor) -> Tensor:
        """m as it will be read again after `move`."""
        return mask

    @torch.no_grad()
    def move(self, mask: Tensor, hard: Tensor) -> None:
        """m and m_hat become these, given as `[..., out, in]`; the view stays until `set_view`."""
        self.matrix(self.mask).copy_(mask)
        self.matrix(self.hard).copy_(hard)

    def straight_through(self, weight: Tensor) -> Tensor:
        """view * weight, with the gradient of an unmasked weight."""
        masked: Tensor = StraightThrough.apply(weight, self.view)  # type: ignore[no-untyped-call]
        return masked

    def forward(self, weight: Tensor) -> Tensor:
        masked: Tensor
        if self.frozen:
            masked = weight * self.view
        elif self.law is not None:
            masked = self.law(weight)
        else:
            masked = self.straight_through(weight)
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
        self._fix()
        self.frozen = True

    def _fix(self) -> None:
        """m and view become the hard mask."""
        self.mask.copy_(self.hard)
        self.view.copy_(self.hard)

    @torch.no_grad()
    def harden(self, scores: Tensor, pattern: Pattern) -> None:
        """hard <- the top entries of `scores` (in the weight's layout)."""
        self.matrix(self.hard).copy_(top_mask(self.matrix(scores), pattern))


STEPS_OF_M = 32767
"""m is kept to one part in this: the same everywhere, where bfloat16 near 1 would lose increments below 0.002."""


class PackedMask(SoftMask):
    """m and m_hat in one 16-bit integer an entry: m in steps of 1/32767, and the sign says whether m_hat keeps it.

    The view is not kept but made in each forward from these and the softness x, which for a compiled forward is one
    kernel with the product. Annealing alone uses it: what the view is multiplied by (`keep_norm_of`) or hardens to by
    threshold has no place in it.
    """

    state: Tensor
    softness: Tensor

    def _keep_ones(self, weight: Tensor) -> None:
        ones = torch.full_like(weight, -1 - STEPS_OF_M, dtype=torch.int16)
        self.state = nn.Parameter(ones, requires_grad=False)
        # A tensor, so that a compiled forward sees it change; of one dimension, because scalars cannot be sharded.
        self.softness = nn.Parameter(weight.new_ones(1), requires_grad=False)
        self.shown: tuple[float, int] | None = None
        """What `set_softness` last wrote, and the version of the tensor that this made."""

    @property
    def mask(self) -> Tensor:  # type: ignore[override]
        """m, made from the state."""
        return unpacked(self.state)

    @property
    def hard(self) -> Tensor:  # type: ignore[override]
        """m_hat, made from the state."""
        return self.state < 0

    @property
    def view(self) -> Tensor:  # type: ignore[override]
        """What the forward multiplies by, made from the state."""
        return viewed(self.state, self.softness)

    def stored(self) -> list[Tensor]:
        return [self.state] * 3

    def rounded(self, mask: Tensor) -> Tensor:
        return unpacked(packed(mask, torch.zeros_like(mask, dtype=torch.bool)))

    @torch.no_grad()
    def move(self, mask: Tensor, hard: Tensor) -> None:
        self.matrix(self.state).copy_(packed(mask, hard))

    def straight_through(self, weight: Tensor) -> Tensor:
        masked: Tensor = StraightThroughPacked.apply(weight, self.state, self.softness)  # type: ignore[no-untyped-call]
        return masked

    @torch.no_grad()
    def set_view(
        self, softness: float, *, hard: Literal["top-n", "threshold"] = "top-n", keep_norm_of: Tensor | None = None
    ) -> None:
        if hard != "top-n" or keep_norm_of is not None:
            raise RecipeError("mask_storage='int16': its view is x m + (1 - x) m_hat and nothing else; use 'float32'")
        self.softness.fill_(softness)

    def _fix(self) -> None:
        hard = self.matrix(self.hard)
        self.move(hard.to(self.softness.dtype), hard)
        self.softness.fill_(0.0)

    @torch.no_grad()
    def harden(self, scores: Tensor, pattern: Pattern) -> None:
        self.move(self.matrix(self.mask), top_mask(self.matrix(scores), pattern))


@torch.no_grad()
def set_softness(masks: Sequence[SoftMask], softness: float) -> None:
    """`set_view` of many packed masks at once; those that show it already, all through heating, are left alone."""
    others = [
        soft for soft in masks if isinstance(soft, PackedMask) and soft.shown != (softness, soft.softness._version)
    ]
    if not others:
        return
    shown = [soft.softness for soft in others]
    torch._foreach_zero_(shown)
    torch._foreach_add_(shown, softness)
    for soft in others:
        soft.shown = (softness, soft.softness._version)


class StraightThroughPacked(torch.autograd.Function):
    """`StraightThrough` of a view that exists only while it is multiplied by."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, state: Tensor, softness: Tensor) -> Tensor:
        return weight * viewed(state, softness)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def packed(mask: Tensor, hard: Tensor) -> Tensor:
    """m in [0, 1] and the hard mask as 16-bit integers: the nearest step, its bits inverted where m_hat keeps."""
    steps = (mask * STEPS_OF_M + 0.5).to(torch.int16)
    return torch.where(hard, -1 - steps, steps)


def unpacked(state: Tensor) -> Tensor:
    """m of `packed`, float32."""
    return torch.where(state < 0, -1 - state, state).float() * (1.0 / STEPS_OF_M)


def viewed(state: Tensor, softness: Tensor) -> Tensor:
    """x m + (1 - x) m_hat of `packed`, float32; `softness` holds x, `[1]`."""
    return quench_view(unpacked(state), state < 0, softness)


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


def attach(
    module: nn.Module,
    parameter: str,
    *,
    transposed: bool,
    slorb: SLoRB | None = None,
    storage: Storage = "float32",
) -> SoftMask:
    """Put a mask of ones on `module.parameter`; the model's outputs do not change."""
    weight = getattr(module, parameter)
    kind = SoftMask if storage == "float32" else PackedMask
    soft = kind(weight.detach(), transposed=transposed, slorb=slorb).to(weight.device)
    _own_class(module)
    parametrize.register_parametrization(module, parameter, soft, unsafe=True)
    _share_class(module)
    return soft


_SHARED: dict[tuple[type, tuple[str, ...]], type] = {}
"""The class of modules of a class of which these parameters carry a mask."""


def _share_class(module: nn.Module) -> None:
    """Give modules that are masked alike one class.

    torch makes a class for each module, and what is compiled for a block is guarded by the classes in it: blocks of one
    shape, of this model and of the next one in this process, would each be compiled anew.
    """
    own, names = type(module), tuple(module.parametrizations)  # type: ignore[arg-type,operator]
    key = (own.__bases__[0], names)
    if key not in _SHARED:
        properties = {name: property(_reader(name), vars(own)[name].fset) for name in names}
        _SHARED[key] = type(own.__name__, own.__bases__, {**vars(own), **properties})
    module.__class__ = _SHARED[key]


def _own_class(module: nn.Module) -> None:
    """Take a masked module out of its shared class, before torch changes that."""
    shared = type(module)
    if shared in _SHARED.values():
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def _reader(name: str) -> Callable[[Any], Tensor]:
    """What evaluates a masked parameter. torch's own caches by the module that its class was made for."""

    def read(self: Any) -> Tensor:
        masked: Tensor
        if not parametrize._cache_enabled:
            masked = self.parametrizations[name]()
            return masked
        key = (id(self), name)
        if key not in parametrize._cache:
            parametrize._cache[key] = self.parametrizations[name]()
        cached = parametrize._cache[key]
        assert cached is not None
        return cached

    return read


def original(module: nn.Module, parameter: str) -> nn.Parameter:
    """The trained tensor behind the mask."""
    # By the dictionaries: torch's own attributes take ten times as long, and a mask update asks for hundreds.
    behind: Any = module._modules["parametrizations"]
    weight = behind._modules[parameter]._parameters["original"]
    assert isinstance(weight, nn.Parameter)
    return weight


@torch.no_grad()
def squash(module: nn.Module, parameter: str) -> Branch | None:
    """Take the mask off, leave the pruned weight in place, and return the side branch, if there is one.

    The state-dict keys are the original ones again. Raises nothing: call it after `SoftMask.freeze`.
    """
    soft: SoftMask = module.parametrizations[parameter][0]  # type: ignore[index,union-attr,assignment]
    branch, projection = soft.branch, soft.projection
    inputs = soft.matrix(original(module, parameter)).shape[-1]
    soft.branch = soft.projection = None
    _own_class(module)
    parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
    if branch is None:
        return None
    return Branch(branch.detach(), None if projection is None else projection.detach(), inputs)
