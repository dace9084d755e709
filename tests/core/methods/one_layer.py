"""A method on one linear layer, driven step by step: small enough to work every number by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparseforge_core.methods.base import MaskTrack, Method, Surroundings
from sparseforge_core.models.sites import Site
from sparseforge_core.recipe import TrainPlan
from sparseforge_core.sparsity.patterns import Pattern, nm
from sparseforge_core.train.optimizer import build_optimizer, set_rate


class OneLayer:
    """`weight` `[out, in]` under a method for `steps` steps; `step(gradient)` makes one as the loop would."""

    def __init__(
        self, method: Method, weight: list[list[float]], steps: int, pattern: Pattern | None = None, **plan: Any
    ) -> None:
        self.model = nn.Linear(len(weight[0]), len(weight), bias=False)
        self.model.weight.data = torch.tensor(weight)
        self.site = Site("weight", self.model, "weight", False, "mlp", chosen=pattern or nm(2, 4))
        self.track: MaskTrack = method.start(
            Surroundings(model=self.model, sites=[self.site], slorb=None, steps=steps, calibration=lambda *_: [])
        )
        train = TrainPlan(steps=steps, **plan)
        self.optimizer = build_optimizer(self.model, [self.site], train, self.track)
        self.count = 0

    def step(self, gradient: list[list[float]], rate: float) -> torch.Tensor:
        """One step whose loss has this gradient in the effective weight; returns the weight after it."""
        self.count += 1
        set_rate(self.optimizer, rate)
        (self.model.weight * torch.tensor(gradient)).sum().backward()
        self.track.before_update(self.count)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.track.after_update(self.count, self.optimizer)
        return self.site.weight.detach().clone()
