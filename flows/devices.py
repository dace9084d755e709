"""What this machine can compute on, found without importing torch."""

from __future__ import annotations

import os
from pathlib import Path

MICRO_BATCH = {"cpu": None, "gpu-1": 4, "gpu-8": 1}
"""Sequences of one forward on the devices of each pool, before memory has run out; None takes the whole batch."""
CPU_WORKERS = 4
"""Most worker processes that a run starts by itself on a machine without GPUs."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpus() -> list[str]:
    """Names of the visible GPUs as $CUDA_VISIBLE_DEVICES takes them: what it says, else all that the driver shows."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        # CUDA stops reading at the first entry that names no device; "-1" is how people say none.
        names = [name.strip() for name in chosen.split(",")]
        bad = next((i for i, name in enumerate(names) if not name or name.startswith("-")), len(names))
        return names[:bad]
    found = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()]
    return [str(index) for index in range(len(found))]


def default_workers() -> int:
    """One worker a GPU, else one a core, at most four."""
    return len(gpus()) or min(CPU_WORKERS, cores())


def served_here(pool: str) -> bool:
    """Whether this machine has the devices of a pool: `gpu-8` means eight GPUs, anything else a CPU."""
    count = pool.removeprefix("gpu-")
    return count == pool or len(gpus()) >= int(count)
