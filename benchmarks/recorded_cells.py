"""Whole trainings, plain and recorded as CUDA graphs: losses, speed, memory, and the masks that they end with.

python benchmarks/recorded_cells.py [--cases frozen following annealing ast] [--steps 60] [--seconds 100] [--out DIR]

Each is a run of the product's loop from its first step to its last: heating, quench, projection and finetune where a
method has them, so that steps of every kind are recorded. SmolLM2-135M's shape with random weights and
tokens, 16 x 1024 of them a step. The first case is run plain twice: what these two differ by is what kernels leave that
add in any order.
Rows go to recorded_cells.json in --out or $OUT.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.one_shape import add_options, device_of, say, shape_of
from benchmarks.step_profile import CASES, FOLLOWING, LoggedLosses
from benchmarks.steps import Shape, bench, release, synchronize
from sparseforge_core.methods import AST, FrozenMask, MagnitudePruning, Method
from sparseforge_core.objective import Distill, Objective
from sparseforge_core.presets import preset_named
from sparseforge_core.train.loop import Progress, train
from sparseforge_core.train.recording import Recording

FILE = "recorded_cells.json"
CELLS: dict[str, tuple[Method, Objective]] = {
    **CASES,
    "frozen": (FrozenMask(prior=MagnitudePruning()), Distill()),
    "following": (preset_named("lean").method, FOLLOWING),
    "annealing": (preset_named("lean").method, Distill()),
    "ast": (AST(), Distill(kl_weight=0.67)),
}
"""Name -> method and objective; `following` is `lean` with the teacher that takes steps of its own."""


@dataclasses.dataclass
class Cell:
    """What a training left."""

    losses: dict[int, float]
    tokens_per_second: float
    """Over the steps after the first third, in which compiling and recording lie; those of freezing are in it."""
    seconds: float
    """Of making the model and of all steps, `on_third` included."""
    ended: float
    """When the last step was done, by the machine's monotonic clock."""
    peak_bytes: int
    reserved_bytes: int
    kept: list[Tensor]
    """The hard masks, on the CPU."""
    finite: bool


def run_cell(
    shape: Shape,
    method: Method,
    objective: Objective,
    device: torch.device,
    steps: int,
    *,
    recorded: bool,
    on_third: Callable[[], None] | None = None,
) -> Cell:
    """Train from the first step to the last; `on_third` is called after a third of them."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    losses, marks = LoggedLosses(), {}

    def on_step(progress: Progress) -> None:
        if progress.step in (steps // 3, steps):
            synchronize(device)
            if progress.step == steps // 3 and on_third is not None:
                on_third()
            marks[progress.step] = time.monotonic()

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        made = bench(shape, method, device, compiled=on_gpu, folder=Path(folder), objective=objective, steps=steps)
        run = dataclasses.replace(made.run, tracker=losses, log_every=max(1, steps // 12))
        if recorded:
            run = dataclasses.replace(run, recording=Recording(made.run.model, made.teacher, required=False))
        train(run, on_step=on_step)
    whole = time.perf_counter() - began
    taken = marks[steps] - marks[steps // 3]
    cell = Cell(
        losses=losses.seen,
        tokens_per_second=(steps - steps // 3) * shape.tokens / taken,
        seconds=whole,
        ended=marks[steps],
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else 0,
        reserved_bytes=torch.cuda.max_memory_reserved(device) if on_gpu else 0,
        kept=[site.mask.hard.cpu().clone() for site in made.sites],
        finite=all(bool(p.isfinite().all()) for p in made.run.model.parameters()),
    )
    del made, run
    release(device)
    return cell


def apart(one: Cell, other: Cell) -> dict[str, float]:
    """By how much two trainings of one recipe differ."""
    same = sum(int((a == b).sum()) for a, b in zip(one.kept, other.kept, strict=True))
    entries = sum(a.numel() for a in one.kept)
    return {
        "losses_apart": max(abs(loss - other.losses[step]) for step, loss in one.losses.items()),
        "last_losses_apart": abs(one.losses[max(one.losses)] - other.losses[max(other.losses)]),
        "masks_alike": same / entries if entries else 1.0,
    }


def rows_of(name: str, shape: Shape, device: torch.device, steps: int, *, twice: bool) -> Iterator[dict[str, Any]]:
    """A case in each way, and what the ways differ by."""
    method, objective = CELLS[name]
    first: Cell | None = None
    for how in ("plain", *(["plain again"] if twice else []), *(["recorded"] if device.type == "cuda" else [])):
        cell = run_cell(shape, method, objective, device, steps, recorded=how == "recorded")
        yield {
            "case": name,
            "how": how,
            "steps": steps,
            "tokens_per_second": cell.tokens_per_second,
            "seconds": cell.seconds,
            "peak_gib": cell.peak_bytes / 2**30,
            "reserved_gib": cell.reserved_bytes / 2**30,
            "finite": cell.finite,
            "losses": cell.losses,
        }
        if first is not None:
            yield {"case": name, "between": ["plain", how], **apart(first, cell)}
        first = first or cell


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CELLS), default=["frozen", "following", "annealing", "ast"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=3600, help="no case begins after these")
    add_options(parser, FILE)
    options = parser.parse_args(arguments)
    device, shape = device_of(options), shape_of(options)
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for place, name in enumerate(options.cases):
        if time.perf_counter() - began > options.seconds:
            print(f"{name}: no time left", flush=True)
            continue
        for row in rows_of(name, shape, device, options.steps, twice=place == 0):
            say(rows, {**row, "at_s": round(time.perf_counter() - began, 1)}, options, FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
