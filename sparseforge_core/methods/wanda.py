"""Wanda, one-shot: keep the largest |W_ij| ||x_j|| of each group, no weight update (arXiv 2306.11695).

Layers are pruned in order, and each block's statistics are taken on the outputs of the blocks pruned before it,
as the paper does.
"""

from __future__ import annotations

from typing import ClassVar

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import MaskedTrack, MaskTrack, Method, MethodCard, Surroundings
from sparseforge_core.observe.blocks import stream_blocks
from sparseforge_core.sparsity.criteria import WandaScore
from sparseforge_core.specs import spec


@spec("wanda")
class Wanda(Method):
    """Weights times activations."""

    samples: int = 128
    """Calibration sequences."""
    length: int = 2048
    """Tokens per calibration sequence; cut to what the model and the corpus allow by the loader."""
    sequential: bool = True
    """Whether a block's inputs come from the already pruned blocks before it (the paper) or the dense model."""

    trains: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("Sun et al., arXiv 2306.11695", "one-shot")

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 1:
            raise RecipeError(f"samples={self.samples}, length={self.length}: both must be at least 1")

    def calibrates(self) -> bool:
        return True

    def start(self, around: Surroundings) -> MaskTrack:
        track = MaskedTrack(around, by_block=True)
        batches = around.calibration(self.samples, self.length)
        score = WandaScore().score
        stream = stream_blocks(around.model, track.sites, batches, device=around.device, pruned_inputs=self.sequential)
        for block in stream:
            norms = block.input_norms()
            with track.masked(block.sites):
                for site in block.sites:
                    scores = score(site.matrix(site.weight.detach()), norms[site.name])
                    track.harden(site, site.matrix(scores))
                    site.mask.set_view(0.0)
        return track
