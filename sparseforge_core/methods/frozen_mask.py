"""A one-shot mask, frozen, and then retrained: naive retraining, or with a teacher the strongest cheap baseline."""

from __future__ import annotations

from typing import ClassVar

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import MaskedTrack, Method, MethodCard, Surroundings
from sparseforge_core.methods.magnitude import MagnitudePruning
from sparseforge_core.methods.one_shot import one_shot_track
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

    def begins_from(self) -> Method | None:
        return self.prior

    def start(self, around: Surroundings) -> MaskedTrack:
        track = one_shot_track(self.prior, around)
        for site in track.sites:
            site.mask.start_branch(site.weight)
        track.freeze(None)
        return track
