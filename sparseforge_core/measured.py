"""The measurements file of a stage: sealed when it is written, believed only as a whole when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparseforge_core import files
from sparseforge_core.errors import CheckpointMismatch

FORMAT = 2
"""Of the file; 1 was not sealed and did not know its journal."""

FILE, ITEMS, JOURNAL = "measurements.json", "items.jsonl", "journal.jsonl"

UNSEALED = {"format", "cell", "stage", "suite", "context", "items_sha256", "measurements"}
"""What a file of format 1 holds, exactly: one of format 2 does not become one by losing its seal."""


def write(directory: Path, body: dict[str, Any]) -> Path:
    """Write the file of a stage, with the hashes of the items and of the journal that lie beside it; last of all."""
    beside = {"items_sha256": _hash_of(directory / ITEMS), "journal_sha256": _hash_of(directory / JOURNAL)}
    path = directory / FILE
    files.write_json(path, files.seal({"format": FORMAT, **body, **beside}))
    return path


def read(path: Path) -> dict[str, Any]:
    """The body of a measurements file. Raises CheckpointMismatch, saying what to delete, if anything was altered.

    Anything: a number in it, the items behind the numbers, the journal of a training.
    """
    again = f"delete {path.parent} to make it anew"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointMismatch(f"{path} cannot be read ({error}); {again}") from error
    if not isinstance(body, dict) or not (_is_old(body) or files.seal_fits(body)):
        raise CheckpointMismatch(f"{path} was altered: its content does not give its hash; {again}")
    if body["format"] not in (1, FORMAT):
        raise CheckpointMismatch(f"{path} has format {body['format']}, this version reads 1 and {FORMAT}; {again}")
    for name, wanted in ((ITEMS, body["items_sha256"]), (JOURNAL, body.get("journal_sha256"))):
        if wanted is not None and _hash_of(path.with_name(name)) != wanted:
            raise CheckpointMismatch(f"{path.with_name(name)} is missing or was altered; {again}")
    return body


def _is_old(body: dict[str, Any]) -> bool:
    return set(body) == UNSEALED and body["format"] == 1


def _hash_of(path: Path) -> str | None:
    return files.sha256(path) if path.is_file() else None
