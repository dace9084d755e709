"""AST: straight-through training with an annealed decay that the moments do not see (arXiv 2407.20584).

The mask keeps the largest |W| of each group and is refreshed every few steps; pruned entries decay by
lambda(t) (1 - m) W, which grows from zero and enters the update after the first moment, so that the momentum is that
of the task alone. With the recipe's `slorb` it is AST + SLoRB: the branch starts at the block means of what the first
mask prunes. (The released configurations also train the branch's projection; ours is fixed, as in eq. 1.)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import Method, MethodCard, Surroundings
from sparseforge_core.methods.directed import DirectedAdam
from sparseforge_core.methods.magnitude import MagnitudeTrack, pruned
from sparseforge_core.schedules import Linear, Schedule
from sparseforge_core.specs import spec


@spec("ast")
class AST(Method):
    """Adaptive sparse training; give it Distill(kl_weight=...) as the paper does."""

    decay: Schedule = Linear(first=0.0, last=6e-5, end=0.2)
    """lambda over progress (the LLaMA recipe; GPT-2's is 1e-4, reached at a quarter)."""
    refresh_every: int = 10
    """Steps between re-selections of the mask."""

    card: ClassVar[MethodCard] = MethodCard("Huang et al., arXiv 2407.20584", "retraining")

    def __post_init__(self) -> None:
        if self.refresh_every < 1:
            raise RecipeError(f"refresh_every={self.refresh_every}: must be at least 1")
        if min(self.decay.at(0.0), self.decay.at(1.0)) < 0:
            raise RecipeError("decay: must not be negative")

    def unshardable(self) -> str | None:
        return None

    def start(self, around: Surroundings) -> ASTTrack:
        return ASTTrack(self, around)


class ASTTrack(MagnitudeTrack):
    """Masks by magnitude, and the direction u = mu + lambda(t) (1 - m) W of every masked weight."""

    def __init__(self, method: AST, around: Surroundings) -> None:
        super().__init__(around)
        self.method = method
        self.decay = 0.0
        self.select()
        self.show()
        for site in self.sites:
            site.mask.start_branch(site.weight)
        self.placed()

    def placed(self) -> None:
        self.site_of = {id(site.weight): site for site in self.sites}

    def optimizer(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        return DirectedAdam(groups, betas=betas, eps=eps, direct=self.direct)

    def direct(self, parameters: list[nn.Parameter], means: list[Tensor]) -> list[Tensor | None]:
        """u of masked weights; kept entries never decay."""
        found: list[Tensor | None] = [None] * len(parameters)
        masked = [i for i, parameter in enumerate(parameters) if id(parameter) in self.site_of]
        if masked:
            held = pruned([self.site_of[id(parameters[i])] for i in masked])
            torch._foreach_mul_(held, self.decay)
            torch._foreach_add_(held, [means[i] for i in masked])
            for i, direction in zip(masked, held, strict=True):
                found[i] = direction
        return found

    def before_update(self, step: int) -> None:
        self.decay = self.method.decay.at(step / self.steps)

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step % self.method.refresh_every == 0:
            self.select()
            self.show()

    def summary(self) -> dict[str, float]:
        return {**super().summary(), "anneal/decay": self.decay}
