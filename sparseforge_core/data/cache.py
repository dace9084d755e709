"""Content-addressed folders, made once: whoever comes later, or at the same time, uses the first one's."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseforge_core import files


def content_key(identity: dict[str, Any]) -> str:
    """16 hex digits over everything that determines a folder's contents."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` unless it is there; a reader finds all of it or nothing.

    `make` gets a temporary folder that is renamed when complete. One process works while others wait; what a killed
    one left behind is cleared by the next.
    """
    if folder.is_dir():
        return folder
    with files.only_one(folder):
        if not folder.is_dir():
            for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
                shutil.rmtree(leftover)
            with files.new_folder(folder) as temporary:
                make(temporary)
    return folder
