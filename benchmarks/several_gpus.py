"""The part of `bench train` that needs two GPUs: `benchmarks/ranks.py` in processes of its own, and what it found."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).with_name("ranks.py")
NEEDED = 2
SECONDS = 150.0
"""For each of the two questions, how fast and how alike."""
MEASURES = (
    "two_gpu_speedup",
    "two_gpu_loss_difference.replicate",
    "two_gpu_mask_agreement.replicate",
    "two_gpu_mask_agreement.shard.longer",
    "two_gpu_resume_bit_exact.shard",
)
"""What of it belongs to the figures of training; benchmarks/results/ranks.json has the rest."""


def why_not(device: torch.device, *, small: bool) -> str | None:
    """A sentence where two GPUs are not at hand; small shapes run on the CPU."""
    if small:
        return None
    found = torch.cuda.device_count() if device.type == "cuda" else 0
    return None if found >= NEEDED else f"it needs {NEEDED} GPUs, this machine has {found}"


def rows(*, small: bool = False) -> list[dict[str, Any]]:
    """Rows of ranks.json among `MEASURES`. Raises RuntimeError if a run failed or found none of its own."""
    found: list[dict[str, Any]] = []
    for question in ("speed", "agreement"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(SCRIPT), "--only", question, "--out", folder, "--seconds", str(SECONDS)]
            done = subprocess.run([*command, *(["--small"] if small else [])], stdout=sys.stderr)
            path = Path(folder) / "ranks.json"
            said = json.loads(path.read_text()) if path.is_file() else []
        wanted = [row for row in said if row["measure"] in MEASURES]
        if done.returncode or not wanted:
            raise RuntimeError(f"{SCRIPT.name} --only {question}: exit status {done.returncode}, {len(said)} figures")
        found += wanted
    return found
