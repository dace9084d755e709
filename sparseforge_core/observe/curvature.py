"""Diagonal curvature of the loss in the effective weights.

The default estimator is the empirical Fisher: a moving average of squared gradients. Thanks to the
straight-through backward, a site's gradient *is* the gradient in its effective weight, so an entry whose mask
is near 0 is still seen and can return. It needs no second derivative: attention stays fused, sharding is safe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sparseforge_core.errors import CurvatureUnavailable, RecipeError
from sparseforge_core.models.sites import Site
from sparseforge_core.specs import spec


class Curvature(ABC):
    """Spec of an estimator of diag(H)."""

    @abstractmethod
    def start(self, sites: list[Site]) -> CurvatureAverage:
        """A running estimate for these sites."""


@spec("fisher")
class Fisher(Curvature):
    """diag(H) ~ E[g * g], averaged with decay `decay` per observed gradient (section 4.1's EMA, Fisher's estimate)."""

    decay: float = 0.98

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise RecipeError(f"decay={self.decay}: must lie in [0, 1)")

    def start(self, sites: list[Site]) -> CurvatureAverage:
        return CurvatureAverage(sites, self.decay)


class CurvatureAverage:
    """Exponential moving average of squared gradients, bias-corrected; one tensor a site, in the weight's layout."""

    def __init__(self, sites: list[Site], decay: float) -> None:
        self.sites = sites
        self.decay = decay
        self.count = 0
        self.average = {site.name: torch.zeros_like(site.weight) for site in sites}

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the gradients that the last backward left. Raises CurvatureUnavailable naming sites without one."""
        blind = [site.name for site in self.sites if site.weight.grad is None]
        if blind:
            raise CurvatureUnavailable(
                f"no gradient for {len(blind)} of {len(self.sites)} sites (first: {blind[0]}); their curvature would "
                "stay zero and their scores be magnitudes. Check that these weights train."
            )
        for site in self.sites:
            gradient = site.weight.grad
            assert gradient is not None
            self.average[site.name].mul_(self.decay).addcmul_(gradient, gradient, value=1.0 - self.decay)
        self.count += 1

    def of(self, site: Site) -> Tensor:
        """diag(H) of a site. Raises CurvatureUnavailable before the first observation."""
        if self.count == 0:
            raise CurvatureUnavailable(f"site {site.name}: no gradient was observed before its scores were needed")
        return self.average[site.name] / (1.0 - self.decay**self.count)

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold."""
        return {**self.average, "count": torch.tensor(self.count)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up the state of `state()`."""
        self.count = int(state["count"])
        for name, average in self.average.items():
            average.copy_(state[name])
