"""Solutions of one-shot methods, kept under HOME/solutions: found once, then taken up by all that start from them.

A solution's key covers all that determines its bits: method, weights, pattern, text, seed, the machine and libraries
that computed it, and the code. So a cell gets the very tensors that it would have found by itself on this machine. The
folder may be deleted whenever nothing runs.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparseforge_core import files, specs
from sparseforge_core.checkpoint import MANIFEST, verify
from sparseforge_core.data.cache import content_key
from sparseforge_core.errors import CheckpointMismatch, RecipeError
from sparseforge_core.methods.base import Method, Solved
from sparseforge_core.sparsity.fused import available
from sparseforge_core.sparsity.patterns import Pattern

log = logging.getLogger(__name__)

FORMAT = 1
TENSORS = "solution.safetensors"
MASK, WEIGHT = "mask/", "weight/"
"""Before the name of a site: its keep mask, eight entries a byte, and its weight."""

DECIDING = ("methods", "observe", "sparsity", "models", "data", "permuting.py", "preparing.py")
"""The code that decides what a solution is, and an order of channels."""


class KeptSolutions:
    """The door of one cell to the solutions of a home; `used` says which it went through, for its records."""

    def __init__(self, home: Path, about: Callable[[], dict[str, Any]]) -> None:
        """`about` says what determines a solution besides the method, the machine and the code."""
        self.folder = home / "solutions"
        self.about = about
        self.used: list[dict[str, Any]] = []

    def __call__(self, method: Method, make: Callable[[], Solved]) -> Solved:
        """What `method` decides: read and verified, or made, by one process while others wait for it.

        A solution that is damaged is reported and made anew.
        """
        identity = {"format": FORMAT, "method": specs.encode(method), **self.about(), "code": code_hash()}
        folder = self.folder / content_key(identity)
        while True:
            seen = _stamp(folder)
            found = _read(folder, identity)  # without the lock: many may read at once
            if found is not None:
                log.info("%s: taken from %s, where it took %.1f s", method.kind, folder, found[1])
                return self._said(folder, method, *found, reused=True)
            with files.only_one(folder):
                if _stamp(folder) == seen:  # nobody made it while this process waited
                    began = time.perf_counter()
                    solved = make()
                    seconds = time.perf_counter() - began
                    _write(folder, solved, {"identity": identity, "seconds": seconds})
                    return self._said(folder, method, solved, seconds, reused=False)

    def _said(self, folder: Path, method: Method, solved: Solved, seconds: float, *, reused: bool) -> Solved:
        self.used.append({"key": folder.name, "method": method.kind, "reused": reused, "seconds": seconds})
        return solved


def computed_on(device: torch.device, home: torch.device) -> dict[str, Any]:
    """What of a machine and its libraries decides bits, for a computation on `device` of a model that is on `home`."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "model_on": home.type,
        "cpu": [_processor(), torch.backends.cpu.get_cpu_capability()],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "triton": cuda and available(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
    }


@functools.cache
def _processor() -> str:
    """What the processor calls itself; libraries choose their code by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@functools.cache
def code_hash(root: Path = Path(__file__).parent) -> str:
    """16 hex digits over the source, below `root`, of everything that decides what a solution is."""
    paths = (path for name in DECIDING for path in ((root / name).rglob("*.py") if "." not in name else [root / name]))
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _write(folder: Path, solved: Solved, about: dict[str, Any]) -> None:
    tensors = {MASK + name: torch.from_numpy(np.packbits(mask.numpy())) for name, mask in solved.masks.items()}
    tensors |= {WEIGHT + name: weight.contiguous() for name, weight in solved.weights.items()}
    body = {
        **about,
        "shapes": {name: list(mask.shape) for name, mask in solved.masks.items()},
        "patterns": {name: specs.encode(pattern) for name, pattern in solved.patterns.items()},
        "findings": list(solved.findings.items()),  # in their order, which is that of the rows
    }
    with files.new_folder(folder) as temporary:
        save_file(tensors, temporary / TENSORS)
        body["files"] = {TENSORS: files.sha256(temporary / TENSORS)}
        files.write_json(temporary / MANIFEST, files.seal(body))


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Which folder it is; None where there is none."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns


def _read(folder: Path, identity: dict[str, Any]) -> tuple[Solved, float] | None:
    """A solution that is whole, and the seconds that it took; None where there is none, or it is damaged."""
    if not folder.is_dir():
        return None
    try:
        body = verify(folder)
        if body["identity"] != identity:
            raise CheckpointMismatch(f"{folder} is of something else: it was renamed or altered")
        tensors = load_file(folder / TENSORS)
        shapes = {name: tuple(shape) for name, shape in body["shapes"].items()}
        solved = Solved(
            masks={name: _unpacked(tensors[MASK + name], shape) for name, shape in shapes.items()},
            weights={name: tensors[WEIGHT + name] for name in shapes if WEIGHT + name in tensors},
            patterns={name: specs.decode(body["patterns"][name], Pattern, "pattern") for name in shapes},  # type: ignore[type-abstract]
            findings=dict(body["findings"]),
        )
        return solved, float(body["seconds"])
    except (CheckpointMismatch, RecipeError, SafetensorError, OSError, KeyError) as error:
        log.warning("the solution in %s is not usable and is made anew: %s", folder, error)
        return None


def _unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).reshape(shape)
