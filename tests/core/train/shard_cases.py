"""Fused losses of a sharded head against one process, by `tests/interpreted.py`: two ranks, kernels interpreted.

TRITON_INTERPRET=1 python tests/core/train/shard_cases.py
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from sparseforge_core.objective import batch
from sparseforge_core.objective import fused as losses_fused
from sparseforge_core.recipe import Cell
from tests.core.train.team import agreement, cell, curve, team, trained
from tests.interpreted import run_cases


def fused(what: Cell, folder: Path, **execution: Any) -> tuple[str, list[str]]:
    """`trained` with kernels on the CPU; also what was said against them."""
    losses_fused.BLOCK, losses_fused.CHUNK = 16, 64 * 10
    asked, said = batch.refusal, []

    def refusal(*given: Any) -> str | None:
        said.append(str(asked(*given, on="cpu")))
        return asked(*given, on="cpu")

    batch.refusal = refusal  # type: ignore[assignment]
    try:
        return trained(what, folder, chunks=True, **execution), said
    finally:
        batch.refusal = asked


def losses() -> None:
    """A cell in shards, all phases of it: every step's losses are the kernel's, and what comes of it is the same."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, what = Path(temporary), cell()
        assert trained(what, folder / "alone") == "done"
        for ((ended, said),) in team(2, [functools.partial(fused, what, folder / "shards", sharding="shard")]):
            assert ended == "done"
            assert said == ["None"] * what.recipe.train.steps
        one, two = curve(folder / "alone"), curve(folder / "shards")
        assert max(abs(one[step] - two[step]) / one[step] for step in one) < 1e-5
        assert agreement(folder / "alone", folder / "shards") >= 0.999


CASES = {"losses": losses}

if __name__ == "__main__":
    run_cases(CASES)
