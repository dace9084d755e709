"""A training that is stopped and goes on, beside one that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseforge_core.errors import Interrupted
from sparseforge_core.recipe import Cell
from sparseforge_core.run import train_cell


def whole_and_in_parts(cell: Cell, folder: Path, stop: int) -> tuple[Any, Any]:
    """Hashes of the files that a cell leaves in `folder`/whole, and in `folder`/parts when stopped after a step."""
    train_cell(cell, folder / "whole", folder / "home")
    seen: list[int] = []
    with pytest.raises(Interrupted):
        train_cell(
            cell,
            folder / "parts",
            folder / "home",
            on_step=lambda progress: seen.append(progress.step),
            should_stop=lambda: seen[-1] == stop,
        )
    train_cell(cell, folder / "parts", folder / "home")
    whole, parts = (
        json.loads((folder / name / "final" / "manifest.json").read_text())["files"] for name in ("whole", "parts")
    )
    return whole, parts
