"""What was measured of products: on this machine, in a file of the user's cache, or on another GPU of its generation.

The file lies under a key of what its measurements depend on: GPU, driver, torch, Triton and the text of the kernels;
`tuning.tune` writes it. `measured/` holds one table for each compute capability, committed with the code: what another
GPU of that generation measured is a better guess than none, until this one has measured for itself.
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

from sparseforge_core.errors import ExportError
from sparseforge_core.files import write_json
from sparseforge_core.runtime.kernels.nvrtc import FOLDER, driver_version
from sparseforge_core.runtime.kernels.plans import Plan

log = logging.getLogger(__name__)

Kind = Literal["kernel", "expand", "dense", "cusparselt"]
"""Our kernels; the weight unpacked for this product and let go; a dense copy that is held; a compressed copy."""

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Numbers of rows that are measured; others take the choice of the next larger, or of the last."""

MANY = 1024
"""Rows from which on one way is the fastest whatever their number, so that the largest measured one decides beyond."""

MEASURED = Path(__file__).parent / "measured"

NEWEST = (9, 0)
"""The capability whose table speaks where there is no GPU."""


@dataclass(frozen=True)
class Choice:
    """One way to compute a product, and the seconds it took where it was measured."""

    kind: Kind
    plan: Plan | None = None
    algorithm: int = 0
    seconds: float | None = None
    """None in a table: this way was tried, and cannot compute the product."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        plan = self.plan and self.plan.describe()
        return {"kind": self.kind, "plan": plan, "algorithm": self.algorithm, "seconds": self.seconds}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Choice:
        """Back from the file."""
        return cls(body["kind"], body["plan"] and Plan(**body["plan"]), body["algorithm"], body["seconds"])


Table = dict[str, tuple[Choice, ...]]


def bucket(rows: int) -> int:
    """The measured number of rows that decides for `rows`."""
    return next((size for size in BUCKETS if rows <= size), BUCKETS[-1])


def key(out: int, inputs: int, size: int, dtype: torch.dtype) -> str:
    """A line of the table."""
    return f"{out}x{inputs} {str(dtype).removeprefix('torch.')} rows {size}"


def line(out: int, inputs: int, rows: int, dtype: torch.dtype, device: int | None) -> tuple[Choice, ...]:
    """What decides for a weight `[out, in]` and `rows` rows: this GPU's measurements, else its generation's, or none.

    Without a device, those of NEWEST. Committed measurements of bfloat16 speak for float16, which has as many bytes and
    instructions; not for cuSPARSELt, which chooses its algorithms by type.
    """
    own = _found(table(device), out, inputs, rows, dtype) if device is not None else ()
    if own:
        return own
    known = read_table(*NEWEST) if device is None else generation(device)
    found = _found(known, out, inputs, rows, dtype)
    if found or dtype != torch.float16:
        return found
    return tuple(c for c in _found(known, out, inputs, rows, torch.bfloat16) if c.kind != "cusparselt")


def _found(known: Table, out: int, inputs: int, rows: int, dtype: torch.dtype) -> tuple[Choice, ...]:
    several = (known.get(key(out, inputs, size, dtype), ()) for size in deciding(rows))
    return next((choices for choices in several if choices), ())


@functools.cache
def deciding(rows: int) -> tuple[int, ...]:
    """Measured sizes that may decide for `rows`, the best first: the next larger up to twice, then many for more.

    One row has kernels of its own, so nothing else decides for it.
    """
    if rows <= 1:
        return (1,)
    above = tuple(size for size in BUCKETS if rows <= size <= 2 * rows)
    below = tuple(size for size in reversed(BUCKETS) if MANY <= size < rows)
    return above + below


@functools.cache
def table(device: int) -> Table:
    """All that was measured on a device so far; empty where nothing was."""
    path = table_path(device)
    return read_file(path) if path.exists() else {}


def generation(device: int) -> Table:
    """What a GPU of the same compute capability measured, as committed; empty where none did."""
    return read_table(*torch.cuda.get_device_capability(device))


@functools.cache
def read_table(major: int, minor: int) -> Table:
    """The committed table of a compute capability; empty where there is none."""
    path = MEASURED / f"{major}.{minor}.json"
    return read_file(path) if path.exists() else {}


def read_file(path: Path) -> Table:
    """A table from a file. Raises ExportError, saying what to do, if it holds none."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))["choices"]
        return {name: tuple(Choice.from_json(choice) for choice in found) for name, found in body.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} holds no choices of kernels: {error}; remove it and measure anew") from error


def record(device: int, found: Table) -> None:
    """Add measurements to the table, in memory and in its file."""
    known = table(device)
    known.update(found)
    choices = {name: [choice.to_json() for choice in several] for name, several in known.items()}
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
