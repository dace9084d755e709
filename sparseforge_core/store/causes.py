"""Why attempts end badly, and what is done about it: one class for each kind of failure, one policy for each class.

The class is told from what the store has always kept of an attempt: how it ended, and its error as `<class>: <message>`
(`errors.described`). So attempts of older stores have causes too, and a better table here tells old failures apart
without a migration.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal

from sparseforge_core import errors

Cause = Literal["out of memory", "diverged", "bad input", "lost worker", "interrupted", "unavailable", "unknown"]


@dataclass(frozen=True)
class Policy:
    """What happens after a failure of a class."""

    tries: int | None
    """Attempts after which the stage is quarantined; None: such an attempt does not count."""
    says: str
    """What is done, for people."""
    alone: bool = False
    """Whether the next try waits until nothing else runs, and gets a fresh process."""
    wait: float = 0.0
    """Seconds before the second try; each further wait is twice as long."""


POLICIES: dict[Cause, Policy] = {
    "out of memory": Policy(
        32, "tried again alone, in a fresh process, with half of what went through at once, down to one", alone=True
    ),
    "diverged": Policy(1, "a result: kept in the tables as diverged, never run again and never with another seed"),
    "bad input": Policy(1, "would fail in the same way again: not retried"),
    "lost worker": Policy(10, "tried again from the last checkpoint, in another process"),
    "interrupted": Policy(None, "goes on from its checkpoint; does not count"),
    "unavailable": Policy(5, "the store or a disk was away: tried again after a while", wait=2.0),
    "unknown": Policy(3, "tried again, since nobody knows why"),
}
"""The one table. A micro-batch of one that does not fit ends the first class early (`DoesNotFit`).

A lost worker counts later than an unknown error: machines go away through no fault of a cell, and a cell goes on from
its checkpoint. A cell that kills its worker time and again, for instance because the kernel's out-of-memory killer
strikes, is a lost worker too, and ends in quarantine like any other.
"""

RELEASED = "Released: "
"""Begins the error of the mark, an attempt of its own that ran nothing, from which tries are counted anew."""

FULL = ("No space left on device", "os error 28", "Input/output error", "os error 5)", "Disk quota exceeded")
"""In the text of any error: a disk that is full or gone. Libraries wrap it in exceptions of their own."""

_AWAY = {"Unavailable", "StoreError", "FolderHeld", "OSError", "TimeoutError", "OperationalError", "InterfaceError"}
_AWAY |= {"ConnectionError", "ConnectionResetError", "ConnectionRefusedError", "ConnectionAbortedError"}
_MEMORY = {"OutOfMemory", "DoesNotFit", "OutOfMemoryError", "MemoryError"}
_DIVERGED = {"Diverged", "NotFinite"}
_LOST = {"RanksLost"}
_OURS = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}


def cause_of(status: str, error: str) -> Cause | None:
    """The class of an attempt that ended in `status` with this error; None where nothing went wrong (yet)."""
    name = error.partition(":")[0]
    if status in ("pending", "running"):
        return None
    if status == "done":
        return "diverged" if name in _DIVERGED else None
    if status == "interrupted":
        return "interrupted"
    if status == "lost":
        return "lost worker"
    if name in _MEMORY:
        return "out of memory"
    if name in _DIVERGED:
        return "diverged"
    if name in _AWAY or any(text in error for text in FULL):
        return "unavailable"
    if name in _LOST:
        return "lost worker"
    return "bad input" if name in _OURS else "unknown"


def is_spent(status: str, error: str, attempts: int) -> bool:
    """Whether a stage has used up its tries: its last attempt ended so, the `attempts`th that counts."""
    cause = cause_of(status, error)
    if cause is None or status not in ("failed", "lost"):
        return False
    tries = POLICIES[cause].tries
    return error.startswith("DoesNotFit:") or (tries is not None and attempts >= tries)
