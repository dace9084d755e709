"""Training over several devices: torchrun as a child that this process owns.

*Owned* means: its ranks get the stop signal when we are asked to stop, and the time to save; whatever kills us, kills
torchrun and its ranks too; whatever kills torchrun, its ranks; and all that they print is kept in a log.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.devices import cores, gpus
from flows.placements import Placement
from flows.provenance import process_alive
from flows.rank import ENDINGS
from sparseforge_core import errors, files
from sparseforge_core.errors import Interrupted, RecipeError, SparseForgeError

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.2
STOP_SECONDS = 300.0
"""How long ranks may take to save their shards after the stop signal; then they are killed."""
LAST_SECONDS = 2.0
"""How long the other ranks may take to end after one was lost or has failed; then they are killed."""
TORCHRUN_SECONDS = 10.0
"""How long torchrun may take to copy the last lines into its log when all its ranks have ended; then it is killed."""
TELL_SECONDS = 1.0
TAIL_BYTES = 4000
PR_SET_PDEATHSIG = 1
REFUSED, LOST, STOPPED = 2, 75, 130
"""Exit codes of `python -m sparseforge_core.run`."""


class RanksRefused(RecipeError):
    """The program on the ranks refused what it was given; trying again would end in the same way."""


class RanksFailed(Exception):
    """A rank crashed; another attempt goes on from the last checkpoint."""


class RanksLost(RanksFailed):
    """A rank was killed, stopped, cut off or left behind, and none crashed: no fault of the cell, as it seems."""


@dataclass(frozen=True)
class Ending:
    """How a launch ended."""

    codes: dict[int, int]
    """Exit code by rank; a rank that was killed is not in it."""
    ranks: int
    stopped: bool
    """Whether we asked the ranks to stop."""
    log: Path

    @property
    def done(self) -> bool:
        """Whether every rank ended well."""
        return len(self.codes) == self.ranks and not any(self.codes.values())


@dataclass(frozen=True)
class Where:
    """How far the ranks are, as their journal says."""

    step: int
    steps: int
    loss: float


def train_on_ranks(
    cell_body: str,
    directory: Path,
    home: Path,
    placement: Placement,
    *,
    micro_batch: int | None,
    on_step: Callable[[Any], None] | None,
    should_stop: Callable[[], bool],
) -> Path:
    """Train a cell on as many ranks as its placement has GPUs; the measurements file.

    Raises RecipeError where this process sees fewer GPUs, Interrupted when asked to stop (a checkpoint is there then),
    the error of ours that a rank ended with, MemoryError or OSError if it was one of these, RanksLost where a rank is
    gone, RanksFailed for the rest.
    """
    found = gpus()
    if len(found) < placement.gpus:
        raise RecipeError(
            f"the cell is placed on {placement.pool}: it needs {placement.gpus} GPUs at once, and this process sees "
            f"{len(found)}; start a worker with more: infra/worker.sh {placement.pool}"
        )
    cell = directory.parent / "cell-for-ranks.json"
    files.write_text(cell, cell_body)
    program = ["sparseforge_core.run", "--home", str(home), "train", str(cell), str(directory)]
    program += ["--micro-batch", str(micro_batch)] if micro_batch else []
    told = _Teller(directory / "journal.jsonl", json.loads(cell_body)["cell"]["recipe"]["train"]["steps"], on_step)
    devices = {"CUDA_VISIBLE_DEVICES": ",".join(found[: placement.gpus])}
    ending = launch(program, placement.gpus, directory / "ranks", should_stop, environment=devices, tick=told)
    return measured(ending, directory / "measurements.json")


def measured(ending: Ending, path: Path) -> Path:
    """The measurements file of ranks that ended well; else raises what `train_on_ranks` says."""
    if ending.done and path.is_file():
        return path
    codes = ending.codes
    if ending.stopped or (STOPPED in codes.values() and set(codes.values()) <= {0, STOPPED}):
        raise Interrupted("stopped; the ranks' work so far is in their last checkpoint")
    # A rank that ends takes the others with it: the one that refused, or else crashed, says why.
    bad = sorted((r for r, code in codes.items() if code not in (0, STOPPED)), key=lambda r: _blame(codes[r]))
    said = _complaint(ending.log, *bad[:1])
    name, _, text = said.partition(": ")
    text, name = f"{text} (log: {ending.log})", name.rpartition(".")[2]
    if name in ("MemoryError", "OutOfMemoryError"):
        raise MemoryError(text)
    if name == "OSError":
        raise OSError(text)
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, SparseForgeError):
        raise kind(text)
    if REFUSED in codes.values():
        raise RanksRefused(f"{said} (log: {ending.log})")
    failed = RanksFailed if set(codes.values()) - {0, STOPPED, LOST} else RanksLost
    raise failed(f"exit codes of {ending.ranks} ranks: {codes}, none from those killed; {said} (log: {ending.log})")


def _blame(code: int) -> int:
    """Order of exit codes, the most telling first: refused, crashed, another rank was lost."""
    return {REFUSED: 0, LOST: 2}.get(code, 1)


class _Teller:
    """Tells how far the ranks are: at once, so that a stop is passed on to them from then on, and as they go."""

    def __init__(self, journal: Path, steps: int, on_step: Callable[[Any], None] | None) -> None:
        self.journal, self.steps, self.on_step = journal, steps, on_step
        self.next = 0.0
        self.said = -1

    def __call__(self) -> None:
        if self.on_step is None or time.monotonic() < self.next:
            return
        self.next = time.monotonic() + TELL_SECONDS
        found = self._last()
        if found.step > self.said:
            self.said = found.step
            self.on_step(found)

    def _last(self) -> Where:
        """From the last whole line with a loss; a journal that is not there, or was just begun, is step 0."""
        with contextlib.suppress(FileNotFoundError), self.journal.open("rb") as file:
            file.seek(max(0, self.journal.stat().st_size - 8 * TAIL_BYTES))
            for line in reversed(file.read().splitlines()):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    body = json.loads(line)
                    return Where(int(body["step"]), self.steps, float(body["scalars"]["loss/total"]))
        return Where(0, self.steps, float("nan"))


def launch(
    program: Sequence[str],
    ranks: int,
    folder: Path,
    should_stop: Callable[[], bool],
    *,
    environment: dict[str, str] | None = None,
    stop_seconds: float = STOP_SECONDS,
    tick: Callable[[], None] = lambda: None,
) -> Ending:
    """Run `python -m PROGRAM…` on so many ranks of this machine under torchrun, and wait for the end.

    Must be called in the main thread of its process: the kernel tells torchrun when the *thread* that started it ends.
    Whatever is raised here, Ctrl-C included, no rank outlives it. Once a rank is lost or has failed, the rest are
    killed after LAST_SECONDS: torchrun would wait 30 s for one that hangs in a collective, or is stopped.

    Args:
        program: module and arguments.
        ranks: processes, one a device.
        folder: for `torchrun.log`, with every line of every rank, and one folder a rank with its own.
        should_stop: asked five times a second; once true, ranks get SIGTERM and `stop_seconds` to save.
        environment: added to ours.
        stop_seconds: before SIGKILL.
        tick: called five times a second.
    """
    endings, log = folder / "endings", folder / "torchrun.log"
    shutil.rmtree(endings, ignore_errors=True)  # of an earlier attempt; logs are kept
    endings.mkdir(parents=True)
    process = _start(program, ranks, folder, log, {ENDINGS: str(endings), **(environment or {})})
    stopped = False
    deadline = float("inf")
    told: set[int] = set()
    others = _Others(endings, ranks)
    try:
        while process.poll() is None and time.monotonic() < min(deadline, others.over):
            tick()
            if not stopped and should_stop():
                stopped, deadline = True, time.monotonic() + stop_seconds
            if stopped:  # to the ranks and not to torchrun, which would give them 30 seconds
                _signal(new := set(_alive(endings)) - told, signal.SIGTERM)
                told |= new
            others.end_with_the_lost()
            time.sleep(POLL_SECONDS)
        if process.poll() is not None:  # killed, perhaps: then the kernel has told its ranks, and they are saving
            deadline = min(deadline, time.monotonic() + stop_seconds)
            while _alive(endings) and time.monotonic() < deadline:
                others.end_with_the_lost()
                time.sleep(POLL_SECONDS)
    finally:
        _signal(_alive(endings), signal.SIGKILL)
        process.kill()
        process.wait()
    codes = {rank: record["code"] for rank, record in _records(endings).items() if "code" in record}
    return Ending(codes, ranks, stopped, log)


class _Others:
    """Sees to it that no rank outlives by much one that was lost or has failed, and torchrun none of them."""

    def __init__(self, endings: Path, ranks: int) -> None:
        self.endings, self.ranks = endings, ranks
        self.since = self.over = float("inf")
        """When a rank was first seen to have ended badly, and when torchrun itself must have ended."""

    def end_with_the_lost(self) -> None:
        """Kill the ranks that are left, if one ended badly a while ago: they cannot go on without it, nor save."""
        now, records = time.monotonic(), _records(self.endings)
        alive = {rank: record["pid"] for rank, record in records.items() if process_alive(record["pid"])}
        codes = [record.get("code", 0 if rank in alive else LOST) for rank, record in records.items()]
        if set(codes) - {0, STOPPED}:  # a rank that was stopped has saved, and the others are at it
            self.since = min(self.since, now)
        if now - self.since > LAST_SECONDS:
            _signal(alive.values(), signal.SIGKILL)
        if len(records) == self.ranks and not alive:
            self.over = min(self.over, now + TORCHRUN_SECONDS)


def last_line(log: Path, rank: int | None = None) -> str:
    """The last line that a rank (None: any) wrote, without torchrun's own summary: what people ask for first."""
    return next(reversed(_lines(log, rank)), "the ranks wrote nothing")


def _complaint(log: Path, rank: int | None = None) -> str:
    """The last line of a rank that names an exception, else its last line.

    torchrun copies what a rank prints and what it complains of side by side, so the complaint need not come last.
    """
    named = (line for line in reversed(_lines(log, rank)) if _is_error(line.partition(": ")[0].rpartition(".")[2]))
    return next(named, last_line(log, rank))


def _is_error(name: str) -> bool:
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    return (isinstance(kind, type) and issubclass(kind, Exception)) or re.fullmatch(r"[A-Z]\w*Error", name) is not None


def _lines(log: Path, rank: int | None) -> list[str]:
    """What a rank (None: any) wrote near the end of the log."""
    line = re.compile(r"\[default" + (r"\d+" if rank is None else str(rank)) + r"\]:(.*\S)")
    with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return [match[1] for match in map(line.match, file.read().decode(errors="replace").splitlines()) if match]
    return []


def _start(
    program: Sequence[str], ranks: int, folder: Path, log: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def end_with_parent() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["--max-restarts=0", "--tee=3", f"--log-dir={folder}", "-m", "flows.rank", *program]
    inherited = {
        # Restarts and rendezvous of torch 2.13 hang with gloo otherwise; we restart by launching again.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": str(max(1, cores() // ranks)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env={**os.environ, **inherited, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # A signal to our group (Ctrl-C, a cancelled flow run) is for us: torchrun would cut saving short.
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


def _records(endings: Path) -> dict[int, dict[str, int]]:
    """What each rank has written of itself, by rank: `pid`, and `code` once it has ended by itself."""
    paths = endings.glob("rank-*.json")
    return {int(path.stem.removeprefix("rank-")): json.loads(path.read_text()) for path in paths}


def _alive(endings: Path) -> list[int]:
    """Ranks whose process is there, those included that have said how they end and are still at it."""
    return [record["pid"] for record in _records(endings).values() if process_alive(record["pid"])]


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
