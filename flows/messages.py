"""What a worker process tells its parent. Both sides import it, so it imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparseforge_core.store.causes import Cause


@dataclass(frozen=True)
class Outcome:
    """How a cell ended in a worker."""

    status: Literal["done", "failed", "interrupted", "lost", "taken"]
    error: str = ""
    cause: Cause | None = None
    """The class of what went wrong, which decides what happens next (`store/causes.py`)."""
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
