"""Telling somebody: a command of the user's is called when a cell fails and when a grid ends.

The command is split into words as a shell would, and no shell runs it. What happened comes as one JSON object on its
standard input. Calls are made from a thread, one after the other: a hook that fails, hangs or does not exist costs a
warning, and never a run.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shlex
import subprocess
import threading
from types import TracebackType
from typing import Any

from sparseforge_core.errors import SparseForgeError

log = logging.getLogger(__name__)

VARIABLE = "SPARSEFORGE_NOTIFY"
SECONDS = 30.0
"""How long one call of the command may take."""
CLOSING = 2 * SECONDS
"""How long the end of a run waits for its last calls."""


class Notifier:
    """Calls a command with events while its block runs; without a command it does nothing.

    Raises SparseForgeError for a command that cannot be split into words.
    """

    def __init__(self, command: str | None = None, *, seconds: float = SECONDS) -> None:
        text = command if command is not None else os.environ.get(VARIABLE, "")
        self.words, self.seconds = words_of(text), seconds
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
        self._warned = False

    def cell_failed(self, grid: str, **about: Any) -> None:
        """A cell was given up."""
        self._put({"event": "cell-failed", "grid": grid, **about})

    def ended(self, summary: dict[str, Any], *, seconds: float, pool: str | None = None) -> None:
        """A run of a grid is over, however it ended; of the cells of one pool it is only drained."""
        event = "grid-ended" if pool is None else "pool-drained"
        self._put({"event": event, "pool": pool, "seconds": round(seconds, 1), **summary})

    def _put(self, event: dict[str, Any]) -> None:
        if self.words:
            self._waiting.put(event)

    def __enter__(self) -> Notifier:
        if self.words:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.words:
            self._waiting.put(None)
            self._thread.join(CLOSING)
            if self._thread.is_alive():
                self._warn(f"it was still at work {CLOSING:.0f} s after the end; what waits for it is dropped")

    def _work(self) -> None:
        while (event := self._waiting.get()) is not None:
            try:
                self._call(event)
            except (OSError, subprocess.SubprocessError) as error:
                self._warn(str(error))

    def _call(self, event: dict[str, Any]) -> None:
        body = json.dumps(event, sort_keys=True) + "\n"
        done = subprocess.run(
            self.words, input=body, text=True, capture_output=True, timeout=self.seconds, check=False, shell=False
        )
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            self._warn(f"it ended with code {done.returncode}" + (f": {said[-1][:200]}" if said else ""))

    def _warn(self, what: str) -> None:
        if not self._warned:
            log.warning("the notification command %r failed (%s); the run goes on", self.words[0], what)
        self._warned = True


def words_of(command: str) -> list[str]:
    """The words of a command line. Raises SparseForgeError for an open quote."""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise SparseForgeError(f"--notify {command!r}: {error}; quote it as for a shell") from error
