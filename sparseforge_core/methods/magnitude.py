"""Magnitude pruning, one-shot: keep the largest |W| of each group."""

from __future__ import annotations

from typing import ClassVar

from sparseforge_core.methods.base import MaskedTrack, MaskTrack, Method, MethodCard, Surroundings
from sparseforge_core.specs import spec


@spec("magnitude")
class MagnitudePruning(Method):
    """No data, no training."""

    trains: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("the classic baseline; Han et al., arXiv 1506.02626", "one-shot")

    def start(self, around: Surroundings) -> MaskTrack:
        track = MaskedTrack(around)
        for site in track.sites:
            track.harden(site, site.weight.detach().abs())
        return track
