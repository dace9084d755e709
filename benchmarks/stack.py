"""What a cell costs beyond its own work: drained by a warm worker, and in a process of its own under torchrun.

python benchmarks/stack.py [--grid tiny-smoke] [--repeats 3] [--json]

Drained: from the end of one stage in the store to the beginning of the next, which is all that lies between them (the
answer to the scheduler, its choice, the claim); the first start of the worker is no part of it. Of its own: the wall
time of torchrun with one rank that trains a small cell, less that of the same training in this warm process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flows.cycle import TRAIN, plan_grid
from flows.grids import grid_named
from flows.grids.planned import expand
from flows.home import Home, be_quiet
from flows.launching import launch
from flows.local import run_grid
from sparseforge_core import run
from sparseforge_core.identity import loads
from sparseforge_core.store.store import ResultStore


def drained(home: Home, grid: str) -> list[float]:
    """Milliseconds between the stages of a grid in one warm worker."""
    summary = run_grid(home, grid, workers=1, quiet=True)
    if not summary.complete:
        raise SystemExit(f"{grid} is not complete: {summary.failed}")
    store = ResultStore(home.store_url)
    keys = {state.cell_key for state in store.work(grid)}
    attempts = sorted((a for key in keys for a in store.attempts(key)), key=lambda attempt: attempt.started)
    ends = [attempt.finished for attempt in attempts if attempt.finished is not None]
    return [1e3 * (then.started - end).total_seconds() for end, then in zip(ends, attempts[1:])]


def own_process(home: Home, grid: str, repeats: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds of a small training under torchrun, of the same in this process when warm, and CPU of the former."""
    first = next(cell for cell in expand(grid_named(grid)).cells if cell.tokens)
    cell, body = loads(first.cell_json), home.root / "cell.json"
    body.parent.mkdir(parents=True, exist_ok=True)
    body.write_text(first.cell_json)
    launched, here, used = [], [], []
    for repeat in range(repeats + 1):  # the first warms caches of files, and is thrown away
        folder = home.root / f"own-{repeat}"
        began, before = time.perf_counter(), _children_cpu()
        program = ["sparseforge_core.run", "--home", str(home.root), TRAIN, str(body), str(folder / "launched")]
        ending = launch(program, 1, folder / "ranks", lambda: False)
        launched.append(time.perf_counter() - began)
        used.append(_children_cpu() - before)
        if not ending.done:
            raise SystemExit(f"the rank failed; {ending.log} says why")
        began = time.perf_counter()
        run.train_cell(cell, folder / "here", home.root)
        here.append(time.perf_counter() - began)
    return launched[1:], here[1:], used[1:]


def _children_cpu() -> float:
    """CPU seconds of children that have ended: what a busy machine does not stretch."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(arguments: list[str] | None = None) -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="tiny-smoke")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    be_quiet()
    with tempfile.TemporaryDirectory(prefix="sf-bench-") as folder:
        home = Home(Path(folder), f"sqlite:///{folder}/store.db", f"sqlite:///{folder}/mlflow.db")
        plan_grid(lambda: ResultStore(home.store_url), options.grid)
        gaps = drained(home, options.grid)
        launched, here, used = own_process(home, options.grid, options.repeats)
    found: dict[str, Any] = {
        "grid": options.grid,
        "drained_gaps": len(gaps),
        "drained_ms": statistics.median(gaps),
        "drained_ms_most": max(gaps),
        "own_process_s": statistics.median(launched) - statistics.median(here),
        "own_process_cpu_s": statistics.median(used),
        "launched_s": statistics.median(launched),
        "here_s": statistics.median(here),
        "load": os.getloadavg()[0],
    }
    if options.json:
        print(json.dumps(found))
        return 0
    print(
        f"drained by a warm worker: {found['drained_ms']:.0f} ms a stage (median of {len(gaps)}, most "
        f"{found['drained_ms_most']:.0f} ms)\nin a process of its own: {found['own_process_s']:.1f} s a cell "
        f"({found['launched_s']:.1f} s under torchrun, {found['here_s']:.1f} s of work; "
        f"{found['own_process_cpu_s']:.1f} s of CPU)\n"
        f"load of the machine meanwhile: {found['load']:.1f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
