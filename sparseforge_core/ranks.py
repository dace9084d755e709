"""How the ranks of one cell find each other, stay aware of each other, and part.

torchrun starts the same command N times and tells each process its place by environment variables. From there on:

- `join` makes them a group: NCCL between GPUs, gloo between CPUs, and gloo for words and votes in both cases.
- `agree` ends all of them at once if they were not given the same cell.
- `Beats` is each rank's pulse in the launcher's key-value store, and its ear for the others': one that is dead, stopped
  or cut off ends every rank within HEARTBEAT seconds, one that stays behind the furthest for so long does too.
  Collectives have a time limit of their own, but a long one: a compile or a large checkpoint is no failure.

A rank that ends this way has kept nothing of the step; the cell is to be tried again and goes on from its checkpoint.
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
import threading
import time

import torch
import torch.distributed as dist

from sparseforge_core import distributed
from sparseforge_core.errors import RanksDisagree

log = logging.getLogger(__name__)

HEARTBEAT = 15.0
"""Seconds within which a rank that is not heard of any more ends all; after which one that fell behind does."""

SILENCE = 2 / 3
"""Part of them after which a silent rank is given up; the rest is for the ranks to notice it and to end."""

LONGEST_WAIT = 600.0
"""Seconds that a rank waits in one collective for the others: more than compiling or saving ever takes."""

LOST = 75
"""Exit code where another rank was lost (EX_TEMPFAIL): try the cell again."""

FREE_STEPS = 3
"""Steps of a process in which ranks may fall behind each other: they compile and tune kernels, each in its own time."""


def launched() -> int:
    """Number of ranks that a launcher started with this one, by its environment; 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device() -> torch.device:
    """This rank's device: the GPU of its place on this machine, the first of a process alone, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if launched() > 1 else torch.device("cuda")


def join(*, wait: float = LONGEST_WAIT) -> None:
    """Become one of the ranks that the launcher's environment tells of. Raises RanksDisagree if there is no GPU for it.

    Args:
        wait: seconds that a collective waits for the others.
    """
    device = own_device()
    if device.type == "cuda":
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise RanksDisagree(
                f"rank {os.environ.get('RANK')} is process {device.index} of this machine, which shows "
                f"{torch.cuda.device_count()} GPUs; start at most that many with --nproc-per-node"
            )
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "nccl"
    limit = datetime.timedelta(seconds=wait)
    dist.init_process_group(backend, timeout=limit, device_id=device if backend == "nccl" else None)
    distributed.set_control(None if backend == "gloo" else dist.new_group(backend="gloo", timeout=limit))
    log.info("rank %d of %d on %s (%s)", distributed.rank(), distributed.world(), device, backend)


def leave() -> None:
    """Part from the others; what they still do needs this rank no more."""
    if dist.is_available() and dist.is_initialized():
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # no torchrun: rank 0 keeps the store for all
            distributed.said_by_all("left")
        distributed.set_control(None)
        dist.destroy_process_group()


def agree(what: str, mine: str) -> None:
    """Raise RanksDisagree, on every rank, unless all were given the same `mine` (at most 256 bytes). Collective."""
    said = distributed.said_by_all(mine)
    for place, theirs in enumerate(said):
        if theirs != said[0]:
            raise RanksDisagree(
                f"the ranks do not agree on the {what}: rank 0 has {said[0]!r}, rank {place} has {theirs!r}. Nothing "
                "was trained; start all ranks with the same files and options"
            )


def was_lost(error: BaseException) -> bool:
    """Whether an error says that another rank is gone, rather than that something is wrong here."""
    if isinstance(error, dist.DistError):
        return True
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


class Beats:
    """This rank's pulse and its watch over the others, in a thread of its own, while the block lasts."""

    def __init__(self, *, seconds: float = HEARTBEAT) -> None:
        self.seconds = seconds
        self.reached = 0
        """How far this rank's steps are, in points of the step that all pass in the same order."""
        self.since = 0
        """The point at which this process began."""
        self.well = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="beats", daemon=True)

    def __enter__(self) -> Beats:
        if distributed.world() > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Fall silent: after an error the others are to notice it, otherwise not to take it for this rank's death."""
        self.well = kind is None
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(self.seconds)

    def pass_point(self, number: int) -> None:
        """Say that this rank has come to a point of its steps."""
        self.since = self.since or number
        self.reached = number

    def _watch(self) -> None:
        place, count = distributed.rank(), distributed.world()
        try:
            place_of = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            store = dist.TCPStore(*place_of, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
            watch = _Others(count, self.seconds)
            beat = 0
            while not self._done.is_set():
                beat += 1
                free = self.reached < self.since + 2 * FREE_STEPS
                store.set(f"beat/{place}", f"{beat} {self.reached} {int(free)}")
                said = [store.get(f"beat/{i}").decode() if store.check([f"beat/{i}"]) else None for i in range(count)]
                trouble = watch.trouble(said, time.monotonic())
                if trouble:
                    _end(f"{trouble}; ending this rank too. Run the same command again to go on from the checkpoint")
                self._done.wait(self.seconds / 15)
            if self.well:
                store.set(f"beat/{place}", "done")
        except dist.DistError as error:
            if not self._done.is_set():
                _end(f"the launcher of the ranks is gone ({error}); ending this rank")


class _Others:
    """What was last heard of each rank, and when."""

    def __init__(self, count: int, seconds: float) -> None:
        self.seconds = seconds
        self.heard: list[tuple[str | None, float]] = [(None, time.monotonic())] * count
        self.behind: list[tuple[int, float] | None] = [None] * count
        """Of a rank that is not where the furthest are: the point where it stays, and since when they are ahead."""

    def trouble(self, said: list[str | None], now: float) -> str | None:
        """What is wrong with the ranks, given the last word of each; None: nothing."""
        for place, word in enumerate(said):
            if word != self.heard[place][0]:
                self.heard[place] = (word, now)
            elif word != "done" and now - self.heard[place][1] > SILENCE * self.seconds:
                return f"rank {place} was not heard of for {SILENCE * self.seconds:.0f} s"
        words = [word.split() for word in said if word is not None and word != "done"]
        if len(words) < len(said):
            return None
        points = [int(word[1]) for word in words]
        for place, (_, _, free) in enumerate(words):
            before = self.behind[place]
            if points[place] == max(points) or free == "1":
                self.behind[place] = None
            elif before is None or before[0] != points[place]:
                self.behind[place] = (points[place], now)
            elif now - before[1] > self.seconds:
                return f"rank {place} has stayed behind the others for {self.seconds:.0f} s in one step"
        return None


def _end(why: str) -> None:
    """End this process, whatever its main thread waits for: a collective would not let it raise."""
    sys.stderr.write(f"RankLost: rank {distributed.rank()}: {why}\n")
    sys.stderr.flush()
    os._exit(LOST)
