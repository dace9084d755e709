"""Which kernel a product takes: from a table of measurements on this machine, or a stated default before there is one.

The table is a file in the user's cache, under a key of what the measurements depend on: GPU, driver, torch, Triton and
the text of the kernels. `tuning.tune` writes it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sparseforge_core.files import write_json
from sparseforge_core.runtime.kernels.candidates import candidates
from sparseforge_core.runtime.kernels.nvrtc import FOLDER, driver_version
from sparseforge_core.runtime.kernels.plans import Plan

log = logging.getLogger(__name__)

Kind = Literal["kernel", "expand", "dense", "cusparselt"]
"""Our kernels; the weight unpacked for this product and let go; a dense copy that is held; a compressed copy."""

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Numbers of rows that are measured; others take the choice of the next larger, or of the last."""

LARGEST_OURS = 64
"""Rows up to which our kernels are the default."""


MARGIN = 1.02
"""How much faster than dense another way must be: two measurements of one product differ by about a percent."""


@dataclass(frozen=True)
class Choice:
    """One way to compute a product, and the seconds it took where it was measured."""

    kind: Kind
    plan: Plan | None = None
    algorithm: int = 0
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        plan = self.plan and self.plan.describe()
        return {"kind": self.kind, "plan": plan, "algorithm": self.algorithm, "seconds": self.seconds}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Choice:
        """Back from the file."""
        return cls(body["kind"], body["plan"] and Plan(**body["plan"]), body["algorithm"], body["seconds"])


def bucket(rows: int) -> int:
    """The measured number of rows that decides for `rows`."""
    return next((size for size in BUCKETS if rows <= size), BUCKETS[-1])


def choose(out: int, inputs: int, rows: int, dtype: torch.dtype, device: int, *, copies: bool) -> Choice:
    """The fastest measured way, among those that need no second copy of the weight unless there are `copies`."""
    measured = table(device).get(key(out, inputs, bucket(rows), dtype), ())
    allowed = [choice for choice in measured if copies or choice.kind in ("kernel", "expand")]
    if allowed:
        return min(allowed, key=lambda choice: (choice.seconds or 0.0) * (1.0 if choice.kind == "dense" else MARGIN))
    return default(out, inputs, rows, copies=copies)


@functools.cache
def default(out: int, inputs: int, rows: int, *, copies: bool) -> Choice:
    """What is taken before anything was measured: our kernel for few rows, a dense weight for many."""
    if rows <= LARGEST_OURS:
        return Choice("kernel", candidates(out, inputs, rows)[0])
    return Choice("dense" if copies else "expand")


def key(out: int, inputs: int, size: int, dtype: torch.dtype) -> str:
    """A line of the table."""
    return f"{out}x{inputs} {str(dtype).removeprefix('torch.')} rows {size}"


Table = dict[str, tuple[Choice, ...]]


@functools.cache
def table(device: int) -> Table:
    """All that was measured on a device so far; empty where nothing was."""
    path = table_path(device)
    if not path.exists():
        return {}
    body = json.loads(path.read_text(encoding="utf-8"))
    return {line: tuple(Choice.from_json(choice) for choice in found) for line, found in body["choices"].items()}


def record(device: int, found: Table) -> None:
    """Add measurements to the table, in memory and in its file."""
    known = table(device)
    known.update(found)
    choices = {line: [choice.to_json() for choice in several] for line, several in known.items()}
    write_json(table_path(device), {"measured on": circumstances(device), "choices": choices})
    log.info("%d products measured; the table is %s", len(found), table_path(device))


def table_path(device: int) -> Path:
    """The file of this machine's table."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparseforge"
    digest = hashlib.sha256(json.dumps(circumstances(device), sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"kernels-{digest}.json"


@functools.cache
def circumstances(device: int) -> dict[str, str]:
    """What a measurement depends on."""
    text = b"".join(path.read_bytes() for path in sorted(FOLDER.iterdir()))
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": str(driver_version()),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "kernels": hashlib.sha256(text).hexdigest()[:16],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
