"""SparseGPT, one-shot: prune by second-order scores and let the survivors make up for it (arXiv 2301.00774).

Each linear layer is a least-squares problem in its inputs, with the Hessian H = (2/n) sum x x^T over the calibration
sequences. Columns are visited from left to right: in each group the entries with the smallest w^2 / U_jj^2 go, and the
error of each moves the columns that follow (`sparsity/second_order.py`). Blocks are pruned in order, each on the
outputs of the pruned blocks before it.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
from torch import Tensor

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import MaskedTrack, Method, MethodCard, Surroundings
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.blocks import stream_blocks
from sparseforge_core.observe.grams import Grams, in_order
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

    def start(self, around: Surroundings) -> SparseGPTTrack:
        return SparseGPTTrack(self, around)


class SparseGPTTrack(MaskedTrack):
    """Holds the masks that the sweep chose; the weights behind them are already updated."""

    def __init__(self, method: SparseGPT, around: Surroundings) -> None:
        super().__init__(around)
        self.method = method
        self.raised: dict[str, float] = {}
        batches = around.calibration(method.samples, method.length)
        for block in stream_blocks(around.model, self.sites, batches, device=around.device):
            for group in in_order(block) if method.true_sequential else [block.sites]:
                self._prune(group, Grams(block, group))

    @torch.no_grad()
    def _prune(self, sites: list[Site], grams: Grams) -> None:
        factors: dict[int, list[Factor]] = {}  # sites with the same inputs share the factorisation
        for site in sites:
            gram = grams.of(site)
            if id(gram) not in factors:
                factors = {id(gram): self._factors(site, gram * (2.0 / self.method.samples))}
            matrix = site.matrix(site.weight)
            hard = site.mask.matrix(site.mask.hard)
            for w, kept, factor in zip(_each(matrix), _each(hard), factors[id(gram)], strict=True):
                new, keep = sweep(w, factor, site.pattern, self.method.width)
                w.copy_(new)
                kept.copy_(keep)
            site.mask.set_view(0.0)

    def _factors(self, site: Site, hessian: Tensor) -> list[Factor]:
        factors = [inverse_factor(h, self.method.damping, f"site {site.name}") for h in _each(hessian)]
        used = max(factor.damping for factor in factors)
        if used > self.method.damping:
            self.raised[site.name] = used
            log.warning(
                "site %s: the Hessian was not positive definite; went on with %g of its mean diagonal added",
                site.name,
                used,
            )
        return factors

    def findings(self) -> dict[str, float]:
        raises = [tenfold_raises(used, self.method.damping) for used in self.raised.values()]
        return {"damping_raised_sites": len(raises), "damping_raised_most": max(raises, default=0)}


def _each(x: Tensor) -> list[Tensor]:
    """A matrix, or the matrices of a stack of experts, as views."""
    return [x] if x.ndim == 2 else list(x)
