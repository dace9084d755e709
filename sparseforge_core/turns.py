"""Turns: of the processes that share a device so many train at once; the others open and measure their cells meanwhile.

Trainings that share a GPU get its time in slices: three on an H200 do fewer tokens a second together than one alone
(docs/study.md). What leaves a GPU idle for the most part, reading a model or asking benchmark questions, does not wait.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sparseforge_core import files
from sparseforge_core.errors import FolderHeld, Interrupted, RecipeError

POLL = 0.2
"""Seconds between two tries."""


@dataclass(frozen=True)
class Turns:
    """How many of those that share a folder may train on one device at once."""

    folder: Path
    """Of the locks, which go with the processes that hold them."""
    at_once: int

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise RecipeError(f"--train-at-once {self.at_once}: somebody must train; give 1 or more")

    @contextlib.contextmanager
    def turn(self, device: torch.device, should_stop: Callable[[], bool] | None = None) -> Iterator[float]:
        """Wait for a turn on a device and hold it; gives the seconds waited. Raises Interrupted when asked to stop."""
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            while not any(self._took(stack, device, place) for place in range(self.at_once)):
                if should_stop is not None and should_stop():
                    raise Interrupted("stopped before its turn to train; run the same command again to go on from here")
                time.sleep(POLL)
            yield time.monotonic() - began

    def _took(self, stack: contextlib.ExitStack, device: torch.device, place: int) -> bool:
        try:
            stack.enter_context(files.held(self.folder / f"{name_of(device)}-{place}", seconds=0))
        except FolderHeld:
            return False
        return True


def name_of(device: torch.device) -> str:
    """The same in every process that uses a device, whatever number it has there; of a CPU, its host."""
    host = socket.gethostname()
    return f"{host}-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else host
