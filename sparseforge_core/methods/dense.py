"""Dense rows: the untouched model, and the model given the same tokens, teacher and data as its sparse rivals."""

from __future__ import annotations

from typing import ClassVar

from sparseforge_core.methods.base import MaskTrack, Method, MethodCard, Surroundings
from sparseforge_core.specs import spec


@spec("dense")
class Dense(Method):
    """The model as it is: the reference row."""

    sparsifies: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("the untouched model", "dense")

    def start(self, around: Surroundings) -> MaskTrack:
        return MaskTrack(around)


@spec("dense-control")
class DenseControl(Method):
    """All weights trained on the recipe's tokens and objective, none pruned: what any 'beats dense' needs beside it."""

    sparsifies: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("control for the extra tokens and the teacher", "dense")

    def unshardable(self) -> str | None:
        return None

    def start(self, around: Surroundings) -> MaskTrack:
        return MaskTrack(around)
