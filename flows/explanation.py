"""The page of text that `sparseforge explain` prints, from what `explaining.py` found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CHANGES = 12
"""Differences to the neighbour that are shown."""


def explanation_lines(found: dict[str, Any]) -> list[str]:
    """For a terminal."""
    about = found["about"]
    tokens = f", {about['tokens']:,} tokens" if about["tokens"] else ""
    return [
        f"cell {found['key']}: {about['variant']} ({about['method']}, {about['pattern']}) on {about['model']}{tokens}, "
        f"seed {about['seed']}; placed on {about['pool']}, about {about['device_hours']:.3g} device hours",
        *_section("recipe, where it differs from the defaults", found["recipe"]),
        *_section("wanted by", _wanted(found["wanted"])),
        *_section("needs the model of", [f"{r['cell']}: {r['training']}" for r in found["requires"]]),
        *_section("stages", [f"{s['suite'] or s['stage']}: {s['why']}" for s in found["stages"]]),
        *_neighbour_lines(found["neighbour"]),
        *_section("attempts", [_attempt_line(a) for a in found["attempts"]]),
        *_section("last of its journal", found["journal"]),
        *_section("last of its log", found["log"]),
        *_section("measurements", [_measurement_line(m) for m in found["measurements"]]),
        *_section(f"files in {found['folder']}", [f"{f['path']}  {f['bytes']:,} bytes" for f in found["files"]]),
        *_section("reproduce with", found["reproduce"]),
    ]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _wanted(wanted: dict[str, Any]) -> list[str]:
    lines = [f"grid {r['grid']}: {r['exhibit']}, row {r['row']} ({r['label']})" for r in wanted["rows"]]
    named = {row["grid"] for row in wanted["rows"]}
    lines += [f"grid {grid}, in no row of its own" for grid in wanted["grids"] if grid not in named]
    return lines + [f"cell {cell}, which reads its model" for cell in wanted["cells"]]


def _neighbour_lines(neighbour: dict[str, Any] | None) -> list[str]:
    if neighbour is None:
        return []
    changes = neighbour["changes"]
    more = [f"and {len(changes) - CHANGES} more"] if len(changes) > CHANGES else []
    title = f"against its nearest neighbour in grid {neighbour['grid']}, {neighbour['recipe']} ({neighbour['variant']})"
    return _section(title, [*changes[:CHANGES], *more])


def _attempt_line(attempt: dict[str, Any]) -> str:
    cause = f" ({attempt['cause']})" if attempt["cause"] else ""
    commit = (
        f", commit {attempt['commit'][:12]}{' with changes' if attempt['dirty'] else ''}" if attempt["commit"] else ""
    )
    said = f": {attempt['error']}" if attempt["error"] else ""
    where = f"{attempt['host']}, process {attempt['pid']}, {attempt['device'] or 'no device named'}"
    return (
        f"{attempt['id']} {attempt['stage']} {attempt['status']}{cause}, {attempt['started']}, "
        f"{attempt['seconds']} s on {where}{commit}{said}"
    )


def _measurement_line(row: dict[str, Any]) -> str:
    value = "diverged" if row["value"] is None else f"{row['value']:.6g}"
    error = "" if row["stderr"] is None else f" \N{PLUS-MINUS SIGN} {row['stderr']:.2g}"
    return f"{row['stage']}  {row['metric']}  {value}{error}"
