"""SR-STE: the mask is re-selected by magnitude, and pruned weights decay (arXiv 2102.04010).

Forward W * top2(|W|); gradient g + lambda (1 - m) W. With Adam the decay, being part of the gradient, is divided
by the root of the second moment, as in the published recipes.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from sparseforge_core.distributed import part
from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import Method, MethodCard, Surroundings
from sparseforge_core.methods.magnitude import MagnitudeTrack, pruned
from sparseforge_core.methods.shards import batched
from sparseforge_core.specs import spec


@spec("sr-ste")
class SRSTE(Method):
    """Sparse-refined straight-through training."""

    decay: float = 6e-5
    """lambda: added to the gradient of pruned entries, times the entry."""
    update_every: int = 1
    """Steps between re-selections of the mask (the paper: every forward)."""

    card: ClassVar[MethodCard] = MethodCard("Zhou et al., arXiv 2102.04010", "retraining")

    def __post_init__(self) -> None:
        if self.decay < 0 or self.update_every < 1:
            raise RecipeError(
                f"decay={self.decay}, update_every={self.update_every}: needs decay >= 0, update_every >= 1"
            )

    def unshardable(self) -> str | None:
        return None

    def start(self, around: Surroundings) -> SRSTETrack:
        return SRSTETrack(self, around)


class SRSTETrack(MagnitudeTrack):
    """Re-selects every `update_every` steps; the last selection is the final mask."""

    def __init__(self, method: SRSTE, around: Surroundings) -> None:
        super().__init__(around)
        self.method = method
        self.select()
        self.show()
        for site in self.sites:
            site.mask.start_branch(site.weight)

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        for sites in batched(self.sites, lambda site: site.weight.numel()):
            gradients = []
            for site in sites:
                assert site.weight.grad is not None
                gradients.append(part(site.weight.grad))
            torch._foreach_add_(gradients, pruned(sites), alpha=self.method.decay)

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step % self.method.update_every == 0:
            self.select()
            self.show()
