"""Several trainings on one GPU: in turns, as it takes processes, or side by side under CUDA's multi-process service.

python benchmarks/shared_gpu.py [--cases frozen following] [--processes 1 3] [--steps 120] [--seconds 300] [--out DIR]

Each process trains SmolLM2-135M's shape with random weights and tokens by the product's own loop, and waits after a
third of its steps until all have come as far. A figure is what all do together from there until the last one ends, in
tokens a second; ratios are to one process alone that takes its turns. Steps are recorded as CUDA graphs; where masks
freeze within the rest of them, the few plain steps and the new recording there are part of the figure.
Rows go to shared_gpu.json in --out or $OUT.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.one_shape import add_options, device_of, say, shape_of
from benchmarks.recorded_cells import CELLS, run_cell

FILE = "shared_gpu.json"
CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
TURNS, SERVICE = "turns", "service"
WAIT = 180.0
"""Seconds that a process waits for the others before it gives up."""
LONGEST = 600.0
"""Seconds after which a measurement is given up."""


class NoService(Exception):
    """The multi-process service cannot be had here."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; exit code 1 if a process failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CELLS), default=["frozen", "following"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 3], metavar="N")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=3600, help="no measurement begins after these")
    add_options(parser, FILE)
    parser.add_argument("--meet", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 6:
        parser.error(f"--steps {options.steps}: at least 6, of which a third come before the figure")
    options.device = str(device_of(options))
    if options.meet:
        return _one(options)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is ended
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    failed = False
    for case in options.cases:
        alone: float | None = None
        for how in (TURNS, SERVICE):
            for count in sorted(set(options.processes)):
                what = f"{case}, processes: {count}, {how}"
                if time.monotonic() - began > options.seconds:
                    print(f"{what}: no time left", file=sys.stderr, flush=True)
                    continue
                try:
                    rate = together(case, count, how, options)
                except (NoService, RuntimeError) as error:
                    print(f"{what}: not measured: {error}", file=sys.stderr, flush=True)
                    failed |= isinstance(error, RuntimeError)
                    continue
                row = {"case": case, "processes": count, "how": how, "steps": options.steps}
                row |= {"sequences": shape_of(options).sequences, "tokens_per_second": rate}
                if (how, count) == (TURNS, 1):
                    alone = rate
                say(rows, row | ({} if alone is None else {"over_one": rate / alone}), options, FILE)
    return int(failed)


def together(case: str, count: int, how: str, options: argparse.Namespace) -> float:
    """Tokens a second of `count` processes. Raises RuntimeError if one fails, NoService for one that is not there."""
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        if how == SERVICE:
            given = held.enter_context(multi_process_service(folder, options.device))
        else:
            given = {PIPES: str(folder / "nobody")}  # not by a service that runs here already
        command = [sys.executable, __file__, "--cases", case, "--processes", str(count), "--steps", str(options.steps)]
        command += ["--sequences", str(options.sequences), "--device", options.device, "--meet", str(folder)]
        command += ["--tiny"] if options.tiny else []
        started = []
        for number in range(count):
            said = held.enter_context((folder / f"{number}.log").open("w"))
            process = subprocess.Popen(
                [*command, "--number", str(number)], env={**os.environ, **given}, stdout=said, stderr=said
            )
            held.callback(_end, process)
            started.append(process)
        served = how != SERVICE
        late = time.monotonic() + LONGEST
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            if time.monotonic() > late:
                raise RuntimeError(f"not done after {LONGEST:.0f} s")
            if not served and len(list(folder.glob("*.ready"))) == count:
                served = bool(_ask("get_server_list", given))
                if not served:
                    raise NoService("the processes run without it: it has no server")
            time.sleep(0.2)
        for number, process in enumerate(started):
            if process.poll():
                last = (folder / f"{number}.log").read_text().strip().splitlines()[-1:]
                raise RuntimeError(f"process {number} ended with {process.poll()}: {' '.join(last)}")
        spans = [json.loads((folder / f"{number}.json").read_text()) for number in range(count)]
    taken = max(span["ended"] for span in spans) - min(span["began"] for span in spans)
    return float(sum(span["tokens"] for span in spans) / taken)


@contextlib.contextmanager
def multi_process_service(folder: Path, device: str) -> Iterator[dict[str, str]]:
    """CUDA's multi-process service while the block runs; what its clients need in their environment.

    Raises NoService where there is no GPU or no such program, or it does not start; RuntimeError if it does not end.
    """
    if not device.startswith("cuda"):
        raise NoService("it is CUDA's, and this is no GPU")
    if shutil.which(CONTROL) is None:
        raise NoService(f"there is no {CONTROL} on PATH")
    given = {PIPES: str(folder / "pipe"), LOGS: str(folder / "log")}
    for path in given.values():
        Path(path).mkdir()
    try:
        subprocess.run([CONTROL, "-d"], env={**os.environ, **given}, check=True, timeout=30)
    except (subprocess.SubprocessError, OSError) as error:
        with contextlib.suppress(RuntimeError):  # it may have started all the same; why it did not is said
            _ask("quit", given)
        raise NoService(f"{CONTROL} does not start: {error}") from error
    try:
        yield given
    finally:
        _ask("quit", given)


def _ask(what: str, given: dict[str, str]) -> str:
    """What the service answers. Raises RuntimeError if it does not."""
    env = {**os.environ, **given}
    try:
        done = subprocess.run(
            [CONTROL], input=f"{what}\n", text=True, env=env, check=True, timeout=60, stdout=subprocess.PIPE
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise RuntimeError(f"{CONTROL} does not answer {what!r}, end it by hand: {error}") from error
    return done.stdout.strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a process that is still there end, and see it ended: it may hold the GPU's memory."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _one(options: argparse.Namespace) -> int:
    """One of the processes: train, and wait for the others after a third of the steps."""
    (case,), (count,) = options.cases, options.processes
    meet, shape, device = options.meet, shape_of(options), device_of(options)
    met = 0.0

    def wait() -> None:
        nonlocal met
        (meet / f"{options.number}.ready").touch()
        late = time.monotonic() + WAIT
        while len(list(meet.glob("*.ready"))) < count:
            if time.monotonic() > late:
                raise TimeoutError(f"the other {count - 1} processes were not there after {WAIT:.0f} s")
            time.sleep(0.01)
        met = time.monotonic()  # one clock for all processes of a machine

    cell = run_cell(shape, *CELLS[case], device, options.steps, recorded=device.type == "cuda", on_third=wait)
    tokens = (options.steps - options.steps // 3) * shape.tokens
    (meet / f"{options.number}.json").write_text(json.dumps({"began": met, "ended": cell.ended, "tokens": tokens}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
