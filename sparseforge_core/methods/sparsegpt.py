"""SparseGPT, one-shot: prune by second-order scores and let the survivors make up for it (arXiv 2301.00774).

Each linear layer is a least-squares problem in its inputs, with the Hessian H = (2/n) sum x x^T over the calibration
sequences. Columns are visited from left to right: in each group the entries with the smallest w^2 / U_jj^2 go, and the
error of each moves the columns that follow (`sparsity/second_order.py`). Blocks are pruned in order, each on the
outputs of the pruned blocks before it.
"""

from __future__ import annotations

import logging
from typing import ClassVar

from torch import Tensor

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import Method, MethodCard, Surroundings
from sparseforge_core.methods.layerwise import LayerwiseTrack
from sparseforge_core.models.sites import Site
from sparseforge_core.sparsity.fused_sweep import sweep_together
from sparseforge_core.sparsity.second_order import Factor, inverse_factor, sweep, tenfold_raises
from sparseforge_core.specs import spec

log = logging.getLogger(__name__)


@spec("sparsegpt")
class SparseGPT(Method):
    """Second-order pruning with an update of the surviving weights."""

    samples: int = 128
    """Calibration sequences."""
    length: int = 2048
    """Tokens per calibration sequence; cut to what the model and the corpus allow by the loader."""
    damping: float = 0.01
    """Share of the Hessian's mean diagonal that is added to its diagonal. Where the factorisation (float64) then still
    fails it is repeated with ten times as much, up to a thousandfold; such sites are counted with the result."""
    width: int = 128
    """Columns per block: within it errors are carried at once, beyond it once a block."""
    true_sequential: bool = False
    """Whether the layers of a block are pruned in the order in which they run, each on pruned inputs, or all on those
    of the block's dense layers."""

    trains: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("Frantar & Alistarh, arXiv 2301.00774", "one-shot")

    def __post_init__(self) -> None:
        for name in ("samples", "length", "width"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0.0 < self.damping <= 1.0:
            raise RecipeError(f"damping={self.damping}: must lie in (0, 1]")

    def calibrates(self) -> bool:
        return True

    def moves_weights(self) -> bool:
        return True

    def start(self, around: Surroundings) -> SparseGPTTrack:
        return SparseGPTTrack(self, around)


class SparseGPTTrack(LayerwiseTrack[Factor]):
    """Masks and weights as the column sweep left them."""

    def __init__(self, method: SparseGPT, around: Surroundings) -> None:
        self.method = method
        self.raised: dict[str, float] = {}
        super().__init__(around, samples=method.samples, length=method.length, true_sequential=method.true_sequential)

    def prepare(self, hessian: Tensor, site: Site) -> Factor:
        factor = inverse_factor(hessian, self.method.damping, f"site {site.name}")
        if factor.damping > self.method.damping:
            self.raised[site.name] = max(factor.damping, self.raised.get(site.name, 0.0))
            log.warning(
                "site %s: the Hessian was not positive definite; went on with %g of its mean diagonal added",
                site.name,
                factor.damping,
            )
        return factor

    def solve(self, weight: Tensor, prepared: Factor, site: Site) -> tuple[Tensor, Tensor]:
        return sweep(weight, prepared, site.pattern, self.method.width)

    def solve_together(self, weights: list[Tensor], prepared: Factor, sites: list[Site]) -> list[tuple[Tensor, Tensor]]:
        return sweep_together(weights, prepared, sites[0].pattern, self.method.width)

    def findings(self) -> dict[str, float]:
        raises = [tenfold_raises(used, self.method.damping) for used in self.raised.values()]
        counted = {"damping_raised_sites": len(raises), "damping_raised_most": max(raises, default=0)}
        return {**super().findings(), **counted}
