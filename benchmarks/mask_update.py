"""A mask update (eqs. 3-5) over reading and writing its tensors once.

python benchmarks/mask_update.py [--shape 4096x4096 ...] [--pattern 2:4 block-16] [--json]

The update is the product's own, on one site: score, standardise, rank, gate, blend, push, average, project, view. Its
tensors are weight, curvature, mask (read), mask, hard mask, view (written). Both sides take turns in one run; figures
are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.curvature import seconds
from sparseforge_core.methods import SparseForge
from sparseforge_core.methods.annealing import SparseForgeTrack
from sparseforge_core.methods.base import Surroundings
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.curvature import Batch
from sparseforge_core.sparsity.patterns import BLOCK_16, Pattern, nm

PATTERNS: dict[str, Pattern] = {"2:4": nm(2, 4), "4:8": nm(4, 8), "block-16": BLOCK_16}
STEPS = 10_000
STEP = 5_000
"""In the middle of heating, where every term of the update is at work."""


def track_of(out: int, inputs: int, pattern: Pattern, device: torch.device) -> SparseForgeTrack:
    """A running track on one random matrix, with one gradient observed."""
    torch.manual_seed(0)
    layer = nn.Linear(inputs, out, bias=False, device=device)
    site = Site("layer.weight", layer, "weight", False, "mlp", chosen=pattern)
    around = Surroundings(model=layer, sites=[site], slorb=None, steps=STEPS, calibration=lambda n, length: [])
    track = SparseForge(update_every=10).start(around)
    site.weight.grad = torch.randn_like(site.weight)
    unused: dict[str, Any] = {"tokens": torch.zeros(1, 1), "loss": None, "predictions": None}
    optimizer = torch.optim.SGD(layer.parameters())
    track.observe(Batch(step=1, model=layer, optimizer=optimizer, **unused))
    return track


def measure(out: int, inputs: int, name: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Median seconds of an update and of one read and write of its tensors, and their ratio."""
    track = track_of(out, inputs, PATTERNS[name], device)
    soft, weight = track.sites[0].mask, track.sites[0].weight.detach()
    read = [weight, torch.randn_like(weight), soft.mask.detach()]
    written = [torch.empty_like(soft.mask), torch.empty_like(soft.hard), torch.empty_like(soft.view)]
    sources = [read[0], soft.hard.detach(), read[1]]

    def copy() -> None:
        for target, source in zip(written, sources, strict=True):
            target.copy_(source)

    updates, copies = [], []
    for turn in range(repeats + 1):
        step = STEP + 10 * turn
        update = seconds(lambda step=step: track._update_masks(step), device)
        moved = seconds(copy, device)
        if turn:  # the first warms up
            updates.append(update)
            copies.append(moved)
    # The copies read as many bytes as they write; the update reads three tensors of the weight's size.
    bytes_moved = sum(t.nbytes for t in (*written, *sources))
    wanted = sum(t.nbytes for t in (*read, *written))
    once = statistics.median(copies) * wanted / bytes_moved
    ratio = statistics.median(updates) / once
    return {
        "shape": f"{out}x{inputs}",
        "pattern": name,
        "update_ms": 1e3 * statistics.median(updates),
        "once_ms": 1e3 * once,
        "update_over_copy": ratio,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", nargs="+", default=["576x1536", "2048x2048"], help="out x in of the matrix")
    parser.add_argument("--pattern", nargs="+", choices=sorted(PATTERNS), default=["2:4", "block-16"])
    parser.add_argument("--repeats", type=int, default=7, help="turns that are measured, after one that is not")
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shapes = [tuple(int(part) for part in shape.split("x")) for shape in options.shape]
    rows = [measure(*shape, name, device, options.repeats) for shape in shapes for name in options.pattern]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    if options.json:
        print(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}))
        return 0
    print(f"{name}, torch {torch.__version__}")
    print(f"{'shape':<14}{'pattern':<10}{'update':>12}{'once':>12}{'ratio':>8}")
    for row in rows:
        times = f"{row['update_ms']:>9.3f} ms{row['once_ms']:>9.3f} ms"
        print(f"{row['shape']:<14}{row['pattern']:<10}{times}{row['update_over_copy']:>8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
