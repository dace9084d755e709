"""CAST: dense forwards, while an adaptive L1 pressure drives the weights into the pattern (arXiv 2509.25996).

AdamS: masked-out entries follow (1 - a_t) mu + a_t lambda sign(W) with a_t = t / T, kept ones mu, both divided by the
root of their own second moment. A learnable scale for each of `scale_blocks` column blocks of every row makes up for
the magnitude that is lost; it is folded into the weights at the end, when what is left of the masked-out entries is
pruned. The paper's code is not public; constants that it does not print are the recipe's (betas, eps, warm-up).

The pressure moves an entry by at most the learning rate a step, so what remains of it at the end is of the order of the
last learning rate: use a decaying one. lambda is below bfloat16's resolution: the float32 master weights matter.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseforge_core.distributed import part, sums_over_ranks
from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import Method, MethodCard, Surroundings
from sparseforge_core.methods.directed import DirectedAdam, regroup
from sparseforge_core.methods.magnitude import MagnitudeTrack, pruned
from sparseforge_core.methods.shards import batched
from sparseforge_core.models.sites import Site
from sparseforge_core.sparsity.masking import Branch
from sparseforge_core.sparsity.slorb import expand
from sparseforge_core.specs import spec


@spec("cast")
class CAST(Method):
    """Continuous sparse training; the paper's loss is Distill(kl_weight=1/3)."""

    pressure: float = 4e-7
    """lambda: size of the sign term on masked-out entries, before Adam's division."""
    refresh_every: int = 10
    """T1: steps between re-selections of the mask."""
    scale_blocks: int = 2
    """n: equal column blocks of a row with a learnable scale of their own; 0 learns none."""

    branches: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("arXiv 2509.25996, from its equations", "retraining")

    def __post_init__(self) -> None:
        if self.pressure < 0 or self.refresh_every < 1 or self.scale_blocks < 0:
            raise RecipeError(
                f"pressure={self.pressure}, refresh_every={self.refresh_every}, scale_blocks={self.scale_blocks}: "
                "needs pressure >= 0, refresh_every >= 1, scale_blocks >= 0"
            )

    def unshardable(self) -> str | None:
        return None

    def start(self, around: Surroundings) -> CASTTrack:
        return CASTTrack(self, around)


class RowScale(nn.Module):
    """The effective weight A W, A constant on column blocks: `[..., out, blocks]`, ones at first."""

    of_tensors: ClassVar[bool] = True
    """Whether all that it depends on is in tensors that change in place: a recorded step then follows it."""

    def __init__(self, site: Site, blocks: int) -> None:
        super().__init__()
        matrix = site.matrix(site.weight.detach())
        if matrix.shape[-1] % blocks:
            raise RecipeError(
                f"method.scale_blocks={blocks}: site {site.name} has {matrix.shape[-1]} inputs, not a multiple"
            )
        self.scale = nn.Parameter(torch.ones_like(matrix[..., :blocks]))
        self.matrix = site.matrix

    def forward(self, weight: Tensor) -> Tensor:
        matrix = self.matrix(weight)
        return self.matrix(matrix * expand(self.scale, matrix.shape[-1]))


class CASTTrack(MagnitudeTrack):
    """Hard masks that only the optimizer sees, until the end."""

    def __init__(self, method: CAST, around: Surroundings) -> None:
        super().__init__(around)
        self.method = method
        self.share = 0.0
        self.select()
        if method.scale_blocks:
            for site in self.sites:
                site.mask.law = RowScale(site, method.scale_blocks)
        self.placed()

    def placed(self) -> None:
        self.site_of = {id(site.weight): site for site in self.sites}
        self.scales = [site.mask.law.scale for site in self.sites if isinstance(site.mask.law, RowScale)]

    def optimizer(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        if self.scales:
            groups = regroup(groups, self.scales, weight_decay=0.0)
        return DirectedAdam(groups, betas=betas, eps=eps, direct=self.direct)

    def direct(self, parameters: list[nn.Parameter], means: list[Tensor]) -> list[Tensor | None]:
        """The redirected first moments of masked weights."""
        found: list[Tensor | None] = [None] * len(parameters)
        masked = [i for i, parameter in enumerate(parameters) if id(parameter) in self.site_of]
        if masked:
            free = [means[i] for i in masked]
            pressed = torch._foreach_sign([part(parameters[i].detach()) for i in masked])
            torch._foreach_mul_(pressed, self.share * self.method.pressure)
            torch._foreach_add_(pressed, torch._foreach_mul(free, 1.0 - self.share))
            kept = [part(self.site_of[id(parameters[i])].mask.mask) for i in masked]  # of zeros and ones: no mixture
            for i, direction in zip(masked, torch._foreach_lerp(pressed, free, kept), strict=True):
                found[i] = direction
        return found

    def before_update(self, step: int) -> None:
        self.share = step / self.steps

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step % self.method.refresh_every == 0:
            self.select()

    @torch.no_grad()
    def finish(self) -> dict[str, Branch]:
        if not self.frozen:
            for site in self.sites:
                if site.mask.law is not None:
                    site.weight.copy_(site.mask.law(site.weight))  # fold A, then prune with m_T
                    site.mask.law = None
        return super().finish()

    def summary(self) -> dict[str, float]:
        """With the share of the weights' magnitude that pruning would still cut off."""
        cuts, totals = [], []
        for sites in batched(self.sites, lambda site: site.weight.numel()):
            cuts += [x.abs().sum() for x in pruned(sites)]
            totals += [part(site.weight.detach()).abs().sum() for site in sites]
        found: list[float] = torch.stack([*cuts, *totals]).tolist()  # the device is asked once
        cut, total = sum(found[: len(cuts)]), sum(found[len(cuts) :])
        if self.sharded:
            cut, total = sums_over_ranks([cut, total])
        return {**super().summary(), "mask/residual": cut / max(total, 1e-30)}
