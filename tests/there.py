"""Bundles run in the test's own process, as a process on another machine would run them."""

from __future__ import annotations

import os
from pathlib import Path

from sparseforge_core import bundles
from sparseforge_core.execution import Execution
from sparseforge_core.run import run_bundle


def run_there(
    folder: Path,
    *,
    execution: Execution | None = None,
    index: int | None = None,
    seconds: float | None = None,
    drop_models: bool = False,
) -> Path:
    """Run a bundle in its own home; where its data lie is forgotten afterwards, as when that process ends."""
    before = dict(os.environ)
    try:
        return run_bundle(
            folder,
            folder / bundles.HOME,
            execution or Execution(),
            lambda: False,
            index=index,
            seconds=seconds,
            drop_models=drop_models,
        )
    finally:
        os.environ.clear()
        os.environ.update(before)
