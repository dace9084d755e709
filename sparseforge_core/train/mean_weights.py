"""The mean of the weights of many steps, which training may end with instead of the last ones.

Steps at a high rate walk at random in directions that the text does not care about, and elsewhere it is forgotten for
that; a mean over the way lies nearer to where it began, and at the bottom of what the text does care about (Polyak and
Juditsky 1992; SWA, arXiv 1803.05407; SWAD for other domains, arXiv 2102.08604).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseforge_core.distributed import part

PREFIX = "mean/"


class MeanWeights:
    """The mean over steps of a model's weights that train, in their own type and, where they are sharded, shards."""

    prefix = PREFIX

    def __init__(self, model: nn.Module, first: int) -> None:
        """
        Args:
            model: whose weights.
            first: the step from which on they are averaged.
        """
        self.first, self.count = first, 0
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
        self.means = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.weights.items()}

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Take in the weights that a step has left."""
        if step < self.first:
            return
        self.count += 1
        means, weights = ([part(x) for x in of.values()] for of in (self.means, self.weights))
        torch._foreach_lerp_(means, weights, 1.0 / self.count)

    @torch.no_grad()
    def put(self) -> None:
        """Leave the mean in the model."""
        if self.count:
            for name, weight in self.weights.items():
                part(weight).copy_(part(self.means[name]))

    def state(self) -> dict[str, Tensor]:
        """The mean so far, by name, and of how many steps it is."""
        found = {f"{PREFIX}weights/{name}": mean for name, mean in self.means.items()}
        return {**found, f"{PREFIX}count": torch.tensor(self.count)}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up `state()`."""
        self.count = int(state[f"{PREFIX}count"])
        for name, mean in self.means.items():
            mean.copy_(state[f"{PREFIX}weights/{name}"])
