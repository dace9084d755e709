"""S-STE: straight-through training through a projection that is continuous in the weight (arXiv 2409.09099).

Instead of cutting the smaller entries of a group off, all are moved towards zero by the magnitude of the largest one
that goes: S(w) = sign(w) max(|w| - t, 0), t the (N+1)-th largest |w| of the group. When two entries change places
nothing jumps. One factor a tensor, fixed at the start, restores the scale: beta minimises ||W - beta S(W)||.

The paper's FP8 arithmetic and its unbiased sparse estimate of activation gradients are accelerations of the training
itself and are left out.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseforge_core.methods.base import Method, MethodCard, Surroundings
from sparseforge_core.methods.magnitude import MagnitudeTrack
from sparseforge_core.models.sites import Site
from sparseforge_core.sparsity.masking import Branch
from sparseforge_core.sparsity.patterns import Pattern
from sparseforge_core.specs import spec


@spec("s-ste")
class SSTE(Method):
    """Smooth straight-through training; it has no constants of its own."""

    branches: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("Hu et al., arXiv 2409.09099", "retraining")

    def start(self, around: Surroundings) -> SSTETrack:
        return SSTETrack(around)


def soft_threshold(weight: Tensor, pattern: Pattern) -> Tensor:
    """S of a weight `[..., out, in]`: at most the pattern's count of each group is not zero."""
    grouped = pattern.groups(weight)
    size = grouped.abs()
    limit = size.topk(pattern.keep_of(size.shape[-1]) + 1, dim=-1).values[..., -1:]
    return pattern.ungroup(grouped.sign() * (size - limit).clamp_min(0.0), weight.shape)


class _ThroughThreshold(torch.autograd.Function):
    """beta S(W) forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, law: SoftThreshold) -> Tensor:
        return law.project(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class SoftThreshold(nn.Module):
    """The effective weight beta S(W) of one site."""

    of_tensors: ClassVar[bool] = True
    """Whether all that it depends on is in tensors that change in place: a recorded step then follows it."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        weight = site.matrix(site.weight.detach())
        soft = soft_threshold(weight, site.pattern)
        beta = (weight * soft).sum() / soft.square().sum().clamp_min(torch.finfo(soft.dtype).tiny)
        self.beta = nn.Parameter(beta, requires_grad=False)

    def project(self, weight: Tensor) -> Tensor:
        """beta S(W), in the weight's layout."""
        return self.site.matrix(self.beta * soft_threshold(self.site.matrix(weight), self.site.pattern))

    def forward(self, weight: Tensor) -> Tensor:
        projected: Tensor = _ThroughThreshold.apply(weight, self)  # type: ignore[no-untyped-call]
        return projected


class SSTETrack(MagnitudeTrack):
    """The hard mask follows the weights; the projection itself is the effective weight, at the end too."""

    def __init__(self, around: Surroundings) -> None:
        super().__init__(around)
        for site in self.sites:
            site.mask.law = SoftThreshold(site)
        self.select()

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.select()

    @torch.no_grad()
    def finish(self) -> dict[str, Branch]:
        if not self.frozen:
            for site in self.sites:
                law = site.mask.law
                assert isinstance(law, SoftThreshold), "set at the start"
                site.weight.copy_(law.project(site.weight))
                site.mask.law = None
        return super().finish()
