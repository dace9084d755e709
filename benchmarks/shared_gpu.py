"""Several trainings on one GPU: in turns, as it takes processes, or side by side under CUDA's multi-process service.

python benchmarks/shared_gpu.py [--cases frozen following] [--processes 1 3] [--steps 120] [--seconds 200] [--out DIR]

Each process trains SmolLM2-135M's shape with random weights and tokens, 16 x 1024 of them a step, by the product's own
loop with steps recorded as CUDA graphs, and waits after a third of the steps until all have come as far. A figure is
what all do together from there until the last one ends, in tokens a second; ratios are to one process alone.
Rows go to shared_gpu.json in --out or $OUT.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.recorded_cells import CELLS, run_cell
from benchmarks.step_profile import rounded
from benchmarks.steps import SHAPES, Shape
from benchmarks.train import commit, hardware, small_shapes

CONTROL = "nvidia-cuda-mps-control"
TURNS, SERVICE = "turns", "service"
WAIT = 180.0
"""Seconds that a process waits for the others before it gives up."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; exit code 1 if processes failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CELLS), default=["frozen", "following"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 3], metavar="N")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=3600, help="no measurement begins after these")
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder for shared_gpu.json")
    parser.add_argument("--meet", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shape = small_shapes()["135m"] if options.tiny else SHAPES["135m"]
    if options.meet:
        return _one(options.meet, options.number, options.processes[0], options.cases[0], shape, device, options.steps)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        for how in (TURNS, SERVICE):
            for count in options.processes:
                if time.perf_counter() - began > options.seconds:
                    print(f"{case}, {count} processes, {how}: no time left", flush=True)
                    continue
                try:
                    rate = together(case, count, how, shape, device, options)
                except RuntimeError as error:
                    print(f"{case}, {count} processes, {how}: not measured: {error}", file=sys.stderr, flush=True)
                    if how == TURNS:
                        return 1
                    continue
                row = {"case": case, "processes": count, "how": how, "steps": options.steps, "tokens_per_second": rate}
                alone = [one["tokens_per_second"] for one in rows if (one["case"], one["processes"]) == (case, 1)]
                rows.append(rounded(row | ({"over_one": rate / alone[0]} if alone else {})))
                print(json.dumps(rows[-1]), flush=True)
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        made = {"hardware": hardware(device), "commit": commit(), "rows": rows}
        (Path(options.out) / "shared_gpu.json").write_text(json.dumps(made, indent=1) + "\n")
    return 0


def together(case: str, count: int, how: str, shape: Shape, device: torch.device, options: argparse.Namespace) -> float:
    """Tokens a second of `count` processes. Raises RuntimeError if one fails, or for a service that cannot be had."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as held:
        folder = Path(name)
        given = held.enter_context(multi_process_service(folder, device)) if how == SERVICE else {}
        command = [sys.executable, __file__, "--cases", case, "--processes", str(count), "--steps", str(options.steps)]
        command += ["--device", device.type, "--meet", str(folder), *(["--tiny"] if options.tiny else [])]
        started = []
        for number in range(count):
            said = held.enter_context((folder / f"{number}.log").open("w"))
            process = subprocess.Popen(
                [*command, "--number", str(number)], env={**os.environ, **given}, stdout=said, stderr=said
            )
            held.callback(process.kill)  # none outlives the measurement
            started.append(process)
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            time.sleep(0.2)
        failed = [number for number, process in enumerate(started) if process.poll()]
        if failed:
            last = (folder / f"{failed[0]}.log").read_text().strip().splitlines()[-1:]
            raise RuntimeError(f"process {failed[0]} ended with {started[failed[0]].poll()}: {' '.join(last)}")
        spans = [json.loads((folder / f"{number}.json").read_text()) for number in range(count)]
    taken = max(span["ended"] for span in spans) - min(span["began"] for span in spans)
    return sum(span["tokens"] for span in spans) / taken


@contextlib.contextmanager
def multi_process_service(folder: Path, device: torch.device) -> Iterator[dict[str, str]]:
    """CUDA's multi-process service while the block runs; what its clients need in their environment.

    Raises RuntimeError where there is no GPU or no such program, or it does not start.
    """
    if device.type != "cuda":
        raise RuntimeError("the multi-process service is CUDA's, and this is no GPU")
    if shutil.which(CONTROL) is None:
        raise RuntimeError(f"there is no {CONTROL} on PATH")
    given = {"CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(folder / "log")}
    for path in given.values():
        Path(path).mkdir()
    env = {**os.environ, **given}
    try:
        subprocess.run([CONTROL, "-d"], env=env, check=True, timeout=30)
    except (subprocess.SubprocessError, OSError) as error:
        raise RuntimeError(f"{CONTROL} does not start: {error}") from error
    try:
        yield given
    finally:
        subprocess.run([CONTROL], input="quit\n", text=True, env=env, check=False, timeout=60)


def _one(meet: Path, number: int, count: int, case: str, shape: Shape, device: torch.device, steps: int) -> int:
    """One of the processes: train, and wait for the others after a third of the steps."""
    method, objective = CELLS[case]
    met = 0.0

    def wait() -> None:
        nonlocal met
        (meet / f"{number}.ready").touch()
        late = time.monotonic() + WAIT
        while len(list(meet.glob("*.ready"))) < count:
            if time.monotonic() > late:
                raise TimeoutError(f"the other {count - 1} processes were not there after {WAIT:.0f} s")
            time.sleep(0.01)
        met = time.time()

    cell = run_cell(shape, method, objective, device, steps, recorded=device.type == "cuda", on_third=wait)
    span = {"began": met, "ended": cell.ended, "tokens": (steps - steps // 3) * shape.tokens}
    (meet / f"{number}.json").write_text(json.dumps(span))
    return 0


if __name__ == "__main__":
    sys.exit(main())
