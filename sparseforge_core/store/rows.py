"""What goes into the store and what comes out: plain frozen records."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any, Literal

from sparseforge_core.store.causes import RELEASED, Cause, cause_of, is_spent

AttemptStatus = Literal["running", "done", "failed", "lost", "interrupted"]
Status = Literal["pending"] | AttemptStatus


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """A cell that a grid wants, with what a listing shows of it."""

    key: str
    recipe_key: str
    seed: int
    model: str
    family: str
    pattern: str
    method: str
    variant: str
    tokens: int
    spec_json: str
    """The fully resolved recipe."""
    cell_json: str
    """The cell file."""
    requires: tuple[str, ...] = ()
    """Cells whose trained model this one reads."""
    pool: str = "cpu"
    cost_hours: float = 0.0
    """Estimated device hours, for order and ETA."""


@dataclass(frozen=True, kw_only=True)
class PlannedSuite:
    """A suite that stages refer to."""

    key: str
    name: str
    spec_json: str


@dataclass(frozen=True, kw_only=True)
class PlannedSlot:
    """A recipe's row in an exhibit of one grid."""

    grid: str
    exhibit: str
    row: str
    label: str
    position: int
    recipe_key: str | None = None
    seeds: tuple[int, ...] = ()
    suite_keys: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PublishedNumber:
    """A number quoted from a paper, with its source."""

    exhibit: str
    row: str
    column: str
    value: float | None
    text: str
    source: str
    position: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number of one cell under one stage; value None only with `detail['status'] == 'diverged'`."""

    metric: str
    value: float | None
    stderr: float | None
    n: int
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What every item behind one measurement gave: 0 or 1 for a question, nats for a window of text."""

    metric: str
    """The metric whose mean they make, such as `hellaswag/acc` or `nll`."""
    identity: str
    """Hash of what the items are, in order: outcomes pair item by item only where it is equal."""
    values: tuple[float | None, ...]
    """In the items' order; None for an item without an answer (the model diverged)."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity of a training run over its steps, or a histogram of one."""

    name: str
    steps: tuple[int, ...]
    values: tuple[Any, ...]
    """A number or None at each step; for a histogram the counts in the bins."""
    edges: tuple[float, ...] = ()
    """The bins' edges of a histogram; empty for plain numbers."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Who ran an attempt, with what."""

    git_sha: str = ""
    """Of the code that made it: of a bundle, the code that it carried."""
    dirty: bool = False
    lock_sha: str = ""
    """Of the lock beside the code; empty where another machine's packages are not known to be those."""
    host: str = ""
    """The machine, and where it says so, which boot of it and which namespace of process numbers `pid` is of."""
    device: str = ""
    python: str = ""
    torch: str = ""
    command: str = ""
    pid: int = 0
    flow_run_id: str = ""
    diff_sha: str = ""
    """Hash of what `git diff HEAD` showed, where tracked files other than results differed from the commit."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A live claim on a stage of a cell."""

    id: int
    cell_key: str
    stage: str


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """All that the store keeps of one try at a stage."""

    id: int
    cell_key: str
    stage: str
    status: AttemptStatus
    started: datetime.datetime
    heartbeat: datetime.datetime
    finished: datetime.datetime | None
    error: str
    items_sha256: str | None
    """Hash of the file of per-item results behind the measurements."""
    context: dict[str, Any] | None
    """Circumstances of a finished attempt: device, dtype, versions, wall seconds."""
    provenance: Provenance

    @property
    def cause(self) -> Cause | None:
        """Why it ended as it did, where something went wrong."""
        return cause_of(self.status, self.error)

    @property
    def is_mark(self) -> bool:
        """Whether nothing ran: it only says that tries are counted anew from here."""
        return self.error.startswith(RELEASED)


@dataclass(frozen=True, kw_only=True)
class StageState:
    """One stage of one planned cell as the store sees it now."""

    cell_key: str
    stage: str
    status: Status
    """That of the live attempt, else of the last one; 'pending' if there was none."""
    attempts: int
    """How many tries count: without those that were interrupted on purpose, since the stage was last released."""
    error: str
    requires: tuple[str, ...]
    pool: str
    cost_hours: float
    model: str
    method: str
    variant: str
    seed: int
    tokens: int
    alone: bool = False
    """Whether one of those tries failed in a way that asks for the next to run alone (memory ran out)."""

    @property
    def cause(self) -> Cause | None:
        """Why its last attempt ended as it did, where something went wrong."""
        return cause_of(self.status, self.error)

    @property
    def quarantined(self) -> bool:
        """Whether it has used up its tries; nobody runs it before somebody releases it (`run --retry-failed`)."""
        return is_spent(self.status, self.error, self.attempts)
