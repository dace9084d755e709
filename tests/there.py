"""Bundles run as on another machine, by a command there or in the test's own process."""

from __future__ import annotations

import os
import sys
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


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "sparseforge_core.run", "bundle", str(folder), *options]


def environment(folder: Path) -> dict[str, str]:
    """Of a machine that has the bundle's code alone, and no GPU."""
    own = {"PYTHONPATH": str(folder / bundles.CODE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own}
