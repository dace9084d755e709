"""OWL: blocks with more outliers keep more weights, then any one-shot method prunes (arXiv 2310.05175).

An outlier is an entry whose |W_ij| ||x_j|| is larger than `outlier` times the mean of its block. The share D of
outliers, taken on the dense model, is spread over the blocks so that densities lie within `spread` of the recipe's:
d_l = d + 2 spread (D_l - min D) / (max D - min D), shifted to the mean d. All sites of a block get one density;
N:M recipes get mixed N:M. There the keep counts are whole, so a spread below 1/(2M) hardly moves them.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import MaskTrack, Method, MethodCard, Surroundings
from sparseforge_core.methods.wanda import Wanda
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.blocks import Block, blocks_of, stream_blocks
from sparseforge_core.sparsity.allocation import allocate
from sparseforge_core.sparsity.criteria import WandaScore
from sparseforge_core.sparsity.patterns import Pattern
from sparseforge_core.specs import spec


@spec("owl")
class OWL(Method):
    """Outlier-weighted layer-wise sparsity over a one-shot method."""

    pruner: Method = Wanda()
    """The one-shot method that prunes once the densities are shared out."""
    outlier: float = 5.0
    """How many times its block's mean a score must be to count as an outlier."""
    spread: float = 0.08
    """Largest distance of a block's density from the recipe's, before the shift to the mean (lambda in the paper)."""
    samples: int = 128
    """Calibration sequences for the outliers."""
    length: int = 2048
    """Tokens per calibration sequence; cut to what the model and the corpus allow by the loader."""

    trains: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("Yin et al., arXiv 2310.05175", "one-shot")

    def __post_init__(self) -> None:
        if not self.pruner.sparsifies or self.pruner.trains or isinstance(self.pruner, OWL):
            raise RecipeError(f"pruner: {type(self.pruner).__name__} is no one-shot method that OWL can steer")
        if self.outlier <= 0 or not 0.0 <= self.spread < 0.5:
            raise RecipeError(
                f"outlier={self.outlier}, spread={self.spread}: needs outlier > 0, spread from 0 to less than 0.5"
            )
        if self.samples < 1 or self.length < 1:
            raise RecipeError(f"samples={self.samples}, length={self.length}: both must be at least 1")

    def calibrates(self) -> bool:
        return True

    def moves_weights(self) -> bool:
        return self.pruner.moves_weights()

    def start(self, around: Surroundings) -> MaskTrack:
        batches = around.calibration(self.samples, self.length)
        stream = stream_blocks(around.model, around.sites, batches, device=around.device, pruned_inputs=False)
        shares = [outlier_share(block, self.outlier) for block in stream]
        offsets = {
            site.name: offset
            for sites, offset in zip(blocks_of(around.sites), offsets_of(shares, self.spread), strict=True)
            for site in sites
        }
        share_out(around.sites, offsets)
        return self.pruner.start(around)


@torch.no_grad()
def outlier_share(block: Block, outlier: float) -> float:
    """D of a block: the share of its entries whose score is above `outlier` times their mean."""
    norms = block.input_norms()
    scores = [WandaScore().score(site.matrix(site.weight.detach()), norms[site.name]) for site in block.sites]
    count = sum(score.numel() for score in scores)
    limit = outlier * sum(float(score.double().sum()) for score in scores) / count
    return sum(int((score > limit).sum()) for score in scores) / count


def offsets_of(shares: list[float], spread: float) -> list[float]:
    """What each block's density gains, from 0 to 2 spread; equal shares gain nothing."""
    least, most = min(shares), max(shares)
    return [2.0 * spread * (share - least) / (most - least) if most > least else 0.0 for share in shares]


def share_out(sites: list[Site], offsets: dict[str, float]) -> None:
    """Give each site a pattern whose density is its own plus its offset; sites of one pattern keep its density."""
    by_pattern: dict[Pattern, list[Site]] = {}
    for site in sites:
        by_pattern.setdefault(site.pattern, []).append(site)
    for pattern, members in by_pattern.items():
        wanted = [pattern.density + offsets[site.name] for site in members]
        for site, new in zip(members, allocate(pattern, wanted, [s.weight.numel() for s in members]), strict=True):
            refusal = new.refusal(tuple(site.matrix(site.weight).shape))
            if refusal:
                raise RecipeError(f"site {site.name}: {refusal}")
            site.chosen = new
