"""How far the cells of a bundle are, read from their folders: for whoever waits beside a machine without a store.

Nothing is written and no process is asked, so that it can be looked at from anywhere that sees the folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparseforge_core import bundles, files, measured, specs
from sparseforge_core.bundle_run import CLAIMS, TRAIN, failures, is_trained
from sparseforge_core.bundles import Entry
from sparseforge_core.evaluate.suites import Suite, metrics_of, suite_key
from sparseforge_core.identity import cell_key
from sparseforge_core.opening import divergence
from sparseforge_core.tracking.tracker import read_journal

State = Literal["waiting", "at work", "stopped", "failed", "diverged", "finished"]
"""Stopped: begun, not finished, and no process holds it."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """What the folder of a cell says."""

    key: str
    method: str
    """The kind of its spec."""
    tokens: int
    """That its recipe trains on."""
    seed: int
    state: State
    step: int
    """The last one that the journal has; 0 before any."""
    steps: int
    tokens_per_second: float | None
    """At that step."""
    results: dict[str, float | None] = field(default_factory=dict)
    """The suites measured so far: the mean where there is one, else what comes first. None: not finite."""
    errors: tuple[str, ...] = ()
    """What went wrong last time, by stage."""


def status(folder: Path, home: Path | None = None) -> list[Line]:
    """A line for each cell of the bundle in `folder`, in its order. Raises BundleError for one that is not whole."""
    bundle = bundles.read_bundle(folder)
    home = home or folder / bundles.HOME
    return [_line(entry, home) for entry in bundle.entries]


def table(lines: list[Line]) -> str:
    """The lines as text, and how many cells are in which state."""
    rows = []
    for line in lines:
        about = f"{line.key}  {line.method:<18} {line.tokens / 1e6:7.1f} M  seed {line.seed}"
        rows.append(f"{about}  {line.state:<8}  {_said(line)}".rstrip())
    counts = {line.state: sum(other.state == line.state for other in lines) for line in lines}
    return "\n".join([*rows, ", ".join(f"{count} {state}" for state, count in counts.items())])


def _line(entry: Entry, home: Path) -> Line:
    key, recipe = cell_key(entry.cell), entry.cell.recipe
    folder = home / "cells" / key
    journal, _ = read_journal(folder / TRAIN / measured.JOURNAL)
    logged = [line for line in journal if "scalars" in line]
    results = {
        suite.name: _first(suite, folder / suite_key(suite) / measured.FILE)
        for suite in entry.suites
        if (folder / suite_key(suite) / measured.FILE).is_file()
    }
    errors = tuple(failures(folder).values())
    return Line(
        key=key,
        method=str(specs.encode(recipe.method)["kind"]),
        tokens=recipe.train.tokens,
        seed=entry.cell.seed,
        state=_state(entry, folder, len(results), errors, held=files.is_held(home / CLAIMS / key)),
        step=int(logged[-1]["step"]) if logged else 0,
        steps=recipe.train.steps,
        tokens_per_second=logged[-1]["scalars"].get("tokens_per_second") if logged else None,
        results=results,
        errors=errors,
    )


def _state(entry: Entry, folder: Path, measured_suites: int, errors: tuple[str, ...], *, held: bool) -> State:
    trained = is_trained(folder / TRAIN)
    if trained and divergence(folder / TRAIN) is not None:
        return "diverged"
    if trained and measured_suites == len(entry.suites):
        return "finished"
    if held:
        return "at work"
    if errors:
        return "failed"
    return "stopped" if (folder / TRAIN).is_dir() else "waiting"


def _first(suite: Suite, path: Path) -> float | None:
    rows: dict[str, Any] = {row["metric"]: row["value"] for row in measured.read(path)["measurements"]}
    names = [name for name in metrics_of(suite) if name in rows]
    shown = next((name for name in names if name.startswith("mean/")), names[0] if names else None)
    value = None if shown is None else rows[shown]
    return None if value is None else float(value)


def _said(line: Line) -> str:
    parts = []
    if line.steps and line.state in ("at work", "stopped"):
        speed = "" if line.tokens_per_second is None else f", {line.tokens_per_second:,.0f} tokens/s"
        parts.append(f"step {line.step} of {line.steps}{speed}")
    parts += [f"{name} {'not finite' if value is None else f'{value:.4g}'}" for name, value in line.results.items()]
    return "; ".join([*parts, *line.errors])
