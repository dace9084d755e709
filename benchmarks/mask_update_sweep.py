"""Where the time of the fused mask update goes on a GPU, and which tiles, warps and statistics are the fastest.

python benchmarks/mask_update_sweep.py [--tiles 1024 2048 4096] [--repeats 1 4] [--warps 4 8] [--seconds 55] [--out DIR]

The sites are those of one layer of LLaMA-2-7B's shape, masks and curvature as the preset `lean` keeps them. Each
variant is timed as `sparseforge bench train --parts mask_update` does it: several updates in a row, over one read and
write of the update's tensors at measured copy bandwidth; then kernel by kernel, between events. First comes what a
kernel takes that moves the same bytes in the same tiles and computes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from benchmarks.train import AT_ONCE, BUSY, LEAN, _seconds, agreement, copy_bandwidth, hardware, touched, track_of
from sparseforge_core.methods.annealing import SparseForgeTrack
from sparseforge_core.sparsity import fused

SHAPES = [(4096, 4096)] * 4 + [(11_008, 4096)] * 2 + [(4096, 11_008)]


@triton.jit
def touch(weights, statistics, states, BLOCK: tl.constexpr, REPEAT: tl.constexpr):
    """Read what the update reads and write what it writes."""
    for turn in range(REPEAT):
        first = (tl.program_id(0) * REPEAT + turn).to(tl.int64) * BLOCK
        places = tl.arange(0, BLOCK)
        weight = tl.load(weights + first + places)
        statistic = tl.load(statistics + first + places).to(tl.float32)
        state = tl.load(states + first + places)
        tl.store(states + first + places, tl.where(weight == statistic, state, -1 - state))


def ways(track: SparseForgeTrack) -> dict[str, Callable[[int], Tensor]]:
    """The update by each kind of statistics, as functions of the step."""
    entries = [track._entry(site) for site in track.sites]
    known = torch.zeros(len(entries), 3, dtype=torch.float64, device=track.sites[0].weight.device)
    lean = track._way(5000)
    every = {f"rows_{rows}": dataclasses.replace(lean, rows=rows) for rows in (16, 1)}
    fused.update_masks(entries, every["rows_1"], gathered=known)
    return {
        "rows_16": lambda step: fused.update_masks(entries, every["rows_16"]),
        "rows_1": lambda step: fused.update_masks(entries, every["rows_1"]),
        "last": lambda step: fused.update_masks(entries, every["rows_1"], known=known, gathered=known),
        "last_kept": lambda step: fused.update_masks(entries, every["rows_1"], known=known),
    }


def in_a_row(update: Callable[[int], Tensor], device: torch.device) -> float:
    """Seconds of one update of several in a row."""

    def several() -> None:
        for step in range(AT_ONCE):
            update(5000 + 10 * step)

    return statistics.median([_seconds(several, device) / AT_ONCE for _ in range(9)][2:])


def by_kernel(update: Callable[[int], Tensor], device: torch.device, turns: int = 5) -> dict[str, float]:
    """Microseconds of each kernel of an update, median over some."""
    begun: list[torch.cuda.Event] = []
    seen: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def enter(metadata: Any) -> None:
        begun.append(torch.cuda.Event(enable_timing=True))
        begun[-1].record()

    def leave(metadata: Any) -> None:
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        seen.append((metadata.get()["name"], begun.pop(), ended))

    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    try:
        torch.cuda._sleep(BUSY)  # so that the host is ahead
        for turn in range(turns):
            update(5000 + turn)
        torch.cuda.synchronize(device)
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        knobs.runtime.launch_exit_hook.remove(leave)
    found: dict[str, list[float]] = defaultdict(list)
    for name, first, last in seen:
        found[name].append(1e3 * first.elapsed_time(last))
    return {name: statistics.median(times) for name, times in found.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiles", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--repeats", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--warps", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--seconds", type=float, default=55, help="no variant is begun after these")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder for mask_update_sweep.json")
    options = parser.parse_args(arguments)
    began, device = time.perf_counter(), torch.device("cuda")
    track = track_of(SHAPES, LEAN, device)
    bandwidth = copy_bandwidth(device, 2**30)
    once = sum(touched(site, track) for site in track.sites) / bandwidth
    print(f"{hardware(device)}: {bandwidth / 1e12:.2f} TB/s, once {1e3 * once:.3f} ms", flush=True)
    rows: list[dict[str, Any]] = [{"hardware": hardware(device), "bandwidth": bandwidth, "once": once}]
    for block, repeat in ((2048, 1), (2048, 4)):
        assert track.curvature is not None
        inputs = [(s.weight.detach(), track.curvature.kept(s)[0], s.mask.stored()[0].clone()) for s in track.sites]

        def moved(step: int, block: int = block, repeat: int = repeat, inputs: Any = inputs) -> None:
            for w, h, state in inputs:
                touch[(w.numel() // (block * repeat),)](w, h, state, BLOCK=block, REPEAT=repeat, num_warps=4)

        taken = in_a_row(moved, device)  # type: ignore[arg-type]
        rows.append({"variant": f"touch {block}x{repeat}", "ratio": taken / once})
        print(f"{rows[-1]['variant']:<30}{1e3 * taken:8.3f} ms  ratio {taken / once:.3f}", flush=True)
        del inputs
    usual = fused.TILE, fused.REPEAT, fused.WARPS
    for tile, repeat, warps in itertools.product(options.tiles, options.repeats, options.warps):
        if time.perf_counter() - began > options.seconds:
            print(f"tile {tile} x{repeat} warps {warps}: no time left", flush=True)
            continue
        fused.TILE, fused.REPEAT, fused.WARPS = tile, repeat, warps
        for name, update in ways(track).items():
            if name in ("rows_1", "last_kept") and (repeat, warps) != (options.repeats[0], options.warps[0]):
                continue
            taken, kernels = in_a_row(update, device), by_kernel(update, device)
            said = " ".join(f"{kernel} {time:.0f}" for kernel, time in kernels.items())
            variant = f"{tile} x{repeat} warps {warps} {name}"
            rows.append({"variant": variant, "seconds": taken, "ratio": taken / once, "microseconds": kernels})
            print(f"{variant:<30}{1e3 * taken:8.3f} ms  ratio {taken / once:.3f}  us: {said}", flush=True)
    fused.TILE, fused.REPEAT, fused.WARPS = usual
    print(f"agreement with gate.py: {agreement(track):.7f}; {time.perf_counter() - began:.0f} s", flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "mask_update_sweep.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
