"""Thirty annealing steps of one family each: what they end in, to the bit on one kind of machine.

python -m tests.golden.runs   rewrites tests/golden/runs.json
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparseforge_core.methods import SparseForge
from sparseforge_core.objective import Distill
from sparseforge_core.recipe import TrainPlan
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.sparsity.slorb import SLoRB
from sparseforge_core.tracking.tracker import MemoryTracker
from sparseforge_core.train.loop import train
from tests.contract.test_methods import recipe_of, start
from tests.tiny import EVERY_ARCHITECTURE

FILE = Path(__file__).with_name("runs.json")
STEPS = 30
LOGGED = (1, 10, 20, 30)


def golden_run(architecture: str, folder: Path) -> dict[str, Any]:
    """Losses at some steps, and a hash over every tensor of the finished model and its side branches."""
    plan = TrainPlan(steps=STEPS, sequences=4, length=16, lr=WarmupLinear(peak=3e-3))
    run = start(recipe_of(SparseForge(), architecture, train=plan, slorb=SLoRB(k=8), objective=Distill()), folder)
    train(run)
    assert isinstance(run.tracker, MemoryTracker)
    losses = [run.tracker.scalars_at(step)["loss/total"] for step in LOGGED]
    branches = run.track.finish()
    digest = hashlib.sha256()
    for name, tensor in sorted(run.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    for name, branch in sorted(branches.items()):
        digest.update(name.encode() + branch.values.numpy().tobytes())
    return {"losses": losses, "sha256": digest.hexdigest()}


def machine() -> str:
    """What float arithmetic depends on: another processor or torch rounds sums in another order."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in (info.read_text().splitlines() if info.is_file() else [])]
    first = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    processor = " ".join(first.get(name, "?") for name in ("model name", "cpu family", "model", "stepping"))
    return f"{processor}; {torch.backends.cpu.get_cpu_capability()}; torch {torch.__version__}; one thread"


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: golden_run(name, Path(folder) / name) for name in EVERY_ARCHITECTURE}
    FILE.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1, sort_keys=True) + "\n")
    print(f"{FILE}: {len(runs)} runs of {STEPS} steps on {machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
