"""Trackers: where a training run puts its scalars, histograms and events.

`Journal` appends JSON lines to a file beside the checkpoint and needs nothing else to be alive; everything that
shows a run (progress, MLflow, reports) reads that file.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from sparseforge_core import files


class Tracker(Protocol):
    """What the training loop calls."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Named numbers at a step."""

    def histogram(self, step: int, name: str, edges: list[float], counts: list[int]) -> None:
        """Counts in the bins between `edges` (one more edge than counts)."""

    def event(self, name: str, detail: dict[str, Any]) -> None:
        """Something that happened once."""

    def close(self) -> None:
        """No more will come."""


class Journal:
    """Appends to `journal.jsonl`; on resume, what was written after the checkpoint is dropped first."""

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None and path.is_file():
            kept = [line for line in read_journal(path)[0] if line.get("step", 0) <= resume_step]
            files.write_text(path, "".join(_dump(line) for line in kept))
        elif _is_torn(path):
            path.write_bytes(path.read_bytes() + b"\n")  # else our first line would be lost with the torn one
        self._file = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write one line; a value that is not finite becomes null, with its name kept."""
        self._write({"step": step, "scalars": {k: v if math.isfinite(v) else None for k, v in values.items()}})

    def histogram(self, step: int, name: str, edges: list[float], counts: list[int]) -> None:
        """Write one line."""
        self._write({"step": step, "histogram": {"name": name, "edges": edges, "counts": counts}})

    def event(self, name: str, detail: dict[str, Any]) -> None:
        """Write one line."""
        self._write({"event": name, "detail": detail})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, body: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._file.write(_dump({"t": now, **body}))
        self._file.flush()


class NullTracker:
    """Takes everything and keeps nothing."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Nothing."""

    def histogram(self, step: int, name: str, edges: list[float], counts: list[int]) -> None:
        """Nothing."""

    def event(self, name: str, detail: dict[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class MemoryTracker:
    """Keeps everything in lists, for tests and notebooks."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Keep them."""
        self.lines.append({"step": step, "scalars": dict(values)})

    def histogram(self, step: int, name: str, edges: list[float], counts: list[int]) -> None:
        """Keep it."""
        self.lines.append({"step": step, "histogram": {"name": name, "edges": edges, "counts": counts}})

    def event(self, name: str, detail: dict[str, Any]) -> None:
        """Keep it."""
        self.lines.append({"event": name, "detail": detail})

    def close(self) -> None:
        """Nothing to close."""

    def scalars_at(self, step: int) -> dict[str, float]:
        """The scalars of one step; raises KeyError if none were logged."""
        for line in self.lines:
            if line.get("step") == step and "scalars" in line:
                found: dict[str, float] = line["scalars"]
                return found
        raise KeyError(step)


def read_journal(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Complete lines after byte `offset`, and the offset behind them; a line torn by a crash is left out."""
    if not path.is_file():
        return [], 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if offset > size:  # the journal was cut back by a resume
            offset = 0
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    lines = []
    for raw in whole.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:  # torn by a crash, or begun in the middle because a resume has cut the file back
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines, offset + len(whole)


def _is_torn(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")


def _dump(line: dict[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"
