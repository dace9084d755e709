"""What a checkpoint keeps beyond the student's weights and their moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from sparseforge_core.methods.base import MaskTrack


class Kept(Protocol):
    """Something of a training that goes on where it was, under names of its own."""

    prefix: str
    """All names of its state begin with it, and none of the track's."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up the state of `state()`."""


class Beside:
    """The track's state, and that of others beside it."""

    def __init__(self, track: MaskTrack, others: Sequence[Kept]) -> None:
        self.track, self.others = track, others

    def state(self) -> dict[str, Tensor]:
        found = self.track.state()
        for other in self.others:
            found = {**found, **other.state()}
        return found

    def restore(self, state: dict[str, Any]) -> None:
        left = dict(state)
        for other in self.others:
            other.restore({name: left.pop(name) for name in [*left] if name.startswith(other.prefix)})
        self.track.restore(left)
