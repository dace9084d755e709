"""Magnitude pruning, one-shot: keep the largest |W| of each group; and the track of methods that select anew."""

from __future__ import annotations

from typing import ClassVar

import torch

from sparseforge_core.methods.base import MaskedTrack, MaskTrack, Method, MethodCard, Surroundings
from sparseforge_core.methods.shards import each_part, each_whole
from sparseforge_core.observe.blocks import blocks_of
from sparseforge_core.specs import spec


@spec("magnitude")
class MagnitudePruning(Method):
    """No data, no training."""

    trains: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("the classic baseline; Han et al., arXiv 1506.02626", "one-shot")

    def start(self, around: Surroundings) -> MaskTrack:
        track = MaskedTrack(around, by_block=True)
        for sites in blocks_of(track.sites):
            with track.masked(sites):
                for site in sites:
                    track.harden(site, site.weight.detach().abs())
        return track


class MagnitudeTrack(MaskedTrack):
    """A track whose hard masks are those of the largest |W|, each time that it selects."""

    @torch.no_grad()
    def select(self) -> None:
        """Re-select every hard mask; what the forward sees is left as it is."""
        flips = 0.0
        for site in each_whole(self.sites):
            flips += self.harden(site, site.weight.detach().abs())
            site.mask.mask.copy_(site.mask.hard)
        self.flip_rate = flips / len(self.sites)

    def show(self) -> None:
        """Let the forward see the hard masks."""
        for site in each_part(self.sites):
            site.mask.set_view(0.0)
