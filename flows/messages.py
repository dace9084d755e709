"""What a worker process tells its parent. Both sides import it, so it imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Outcome:
    """How a cell ended in a worker."""

    status: Literal["done", "failed", "interrupted", "lost", "taken"]
    error: str = ""
    permanent: bool = False
    """Whether trying again would fail in the same way (a recipe or data error)."""
    stage: str = ""
    """The stage that did not get done."""


@dataclass(frozen=True)
class StepReport:
    """Where a running cell is; `steps` is 0 for a stage that has just begun, or that does not count steps."""

    cell: str
    stage: str
    step: int = 0
    steps: int = 0
    loss: float = float("nan")
