"""Processes that tests start: they end with the test, and none of theirs is left."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """In a child before it starts its program: stop when the test's process goes, and obey Ctrl-C again."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def processes_of(folder: Path) -> list[tuple[int, str]]:
    """(process id, command line) of every process whose environment or command names this folder."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if process.name.isdigit():
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if str(folder) in (process / "environ").read_bytes().decode(errors="replace") + command:
                    found.append((int(process.name), command))
    return found


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    """Whether it became true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.2)
    return true()
