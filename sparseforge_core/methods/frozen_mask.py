"""A one-shot mask, frozen, and then retrained: naive retraining, or with a teacher the strongest cheap baseline."""

from __future__ import annotations

from typing import ClassVar

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import MaskedTrack, Method, MethodCard, Surroundings
from sparseforge_core.methods.magnitude import MagnitudePruning
from sparseforge_core.specs import spec


@spec("frozen-mask")
class FrozenMask(Method):
    """Decide the mask once by `prior`, zero the rest, train what is left. With TaskOnly it is naive retraining."""

    prior: Method = MagnitudePruning()
    """A one-shot method that decides the mask."""

    card: ClassVar[MethodCard] = MethodCard("naive retraining as in AST, arXiv 2407.20584", "retraining")

    def __post_init__(self) -> None:
        if not self.prior.sparsifies or self.prior.trains:
            raise RecipeError(f"prior: {type(self.prior).__name__} is no one-shot method")

    def start(self, around: Surroundings) -> MaskedTrack:
        track = self.prior.start(around)
        assert isinstance(track, MaskedTrack), "one-shot methods mask their sites"
        for site in track.sites:
            site.mask.start_branch(site.weight)
        track.freeze(None)
        return track
