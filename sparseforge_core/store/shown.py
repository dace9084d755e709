"""What the read side gives to tables and figures: one plain record a row, in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from sparseforge_core.store.curves import curve_from
from sparseforge_core.store.rows import Curve


class ShownSlot(NamedTuple):
    """A recipe's row in an exhibit, with what a listing shows of the recipe; a caption has no recipe."""

    exhibit: str
    row: str
    label: str
    position: int
    recipe_key: str | None
    seeds: list[int]
    suite_keys: list[str]
    note: str
    model: str | None
    tokens: int | None
    method: str | None


class ShownMeasurement(NamedTuple):
    """A measurement of a done stage, as one slot shows it."""

    exhibit: str
    row: str
    position: int
    cell_key: str
    seed: int
    stage: str
    suite: str
    """The suite's name; `train` for the training stage."""
    metric: str
    value: float | None
    """None where `detail` says that the run diverged."""
    stderr: float | None
    n: int
    detail: dict[str, Any]
    context: dict[str, Any]
    """Circumstances of the attempt; one object for all measurements of a stage."""


class TidyMeasurement(NamedTuple):
    """A measurement of a done stage with what it is a measurement of, whether an exhibit shows it or not."""

    method: str
    preset: str
    """What the grid calls the recipe."""
    model: str
    tokens: int
    seed: int
    suite: str
    metric: str
    value: float | None
    stderr: float | None
    n: int
    cell_key: str
    commit: str
    """Of the code that recorded the result."""


class MissingStage(NamedTuple):
    """A stage that a slot shows and that is not done."""

    exhibit: str
    row: str
    cell_key: str
    stage: str
    status: str


@dataclass(frozen=True)
class StoredCurve:
    """A curve as the store keeps it, decoded only when somebody looks at it: most curves of a grid are never drawn."""

    name: str
    body: str

    @cached_property
    def curve(self) -> Curve:
        """The numbers."""
        return curve_from(self.name, self.body)


class ShownCurve(NamedTuple):
    """One curve of a cell, as one slot shows it."""

    exhibit: str
    row: str
    label: str
    position: int
    seed: int
    cell_key: str
    name: str
    stored: StoredCurve

    @property
    def curve(self) -> Curve:
        """The numbers."""
        return self.stored.curve
