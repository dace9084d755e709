"""LLaMA-2-7B's shape, all layers of it, annealed for real steps on all GPUs at hand, against what the plan says.

torchrun --standalone --nproc-per-node=4 benchmarks/seven_b.py [--out DIR] [--layers 32] [--small]

Random weights and tokens: what is measured is whether it fits and how long a step takes, not what is learned. Weights,
masks, curvature and optimizer are sharded, activations computed again. DIR gets `seven_b.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import ranks as benchmark
from sparseforge_core import distributed, ranks
from sparseforge_core.methods.sparseforge import SparseForge
from sparseforge_core.observe.curvature import Fisher
from sparseforge_core.train import parallel

LEAN = SparseForge(mask_storage="int16", statistics_rows=16, curvature=Fisher(storage="bfloat16"))
"""Masks and curvature in 4 bytes a weight; 11 where this torch cannot shard masks of integers."""
STEPS = 22
"""Ten to warm up, ten that are timed, in which masks move once, and two beyond them."""


def main(arguments: list[str] | None = None) -> int:
    """Run on every rank; rank 0 writes and prints. The exit code is 0, or torch's error ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "seven-b-out")))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--small", action="store_true", help="a tiny shape on the CPU, to see that all of it runs")
    parser.add_argument("--commit", default="", help="what the results are to say")
    options = parser.parse_args(arguments)
    if ranks.launched() > 1:
        ranks.join(wait=60.0)
    sizes = benchmark.SMALL if options.small else benchmark.LARGE
    config = {**sizes.seven, "num_hidden_layers": 2 if options.small else options.layers}
    sharding = "shard" if distributed.world() > 1 else "none"
    method = LEAN if parallel.shards_integers() else dataclasses.replace(LEAN, mask_storage="float32")
    found = benchmark.loop(config, sizes.seven_batch, sharding, STEPS, recompute=True, method=method)
    if distributed.rank() == 0:
        write(found, config, sizes.seven_batch, options)
    ranks.leave()
    return 0


def write(found: dict[str, float], config: dict[str, int], batch: tuple[int, int], options: argparse.Namespace) -> None:
    """The measures, printed and in a file."""
    world = distributed.world()
    rows = benchmark.seven_rows(found, config, batch, world, "whole_seven_b")
    command = f"torchrun --standalone --nproc-per-node={world} benchmarks/seven_b.py"
    context = {"hardware": benchmark.hardware(), "command": command, "commit": options.commit}
    listed = [{"measure": m, "value": v, "unit": u, "bar": b, **context} for m, v, u, b in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "seven_b.json").write_text(json.dumps(listed, indent=1) + "\n")
    for measure, value, unit, _ in rows:
        print(f"{measure:<36} {value:>14.6g} {unit}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
