"""`sparseforge status --watch`: the screen drawn again and again, until the grid is over or somebody presses Ctrl-C.

On a terminal it is redrawn in place; anywhere else a line is written whenever something has changed, so that a log
file stays one. With JSON, one object a line.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from typing import TextIO

from flows.status import Status, is_over, screen, summary_line

HOME, TO_END_OF_LINE, TO_END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
CLEAR = f"{HOME}\x1b[2J"
SECONDS, LOG_SECONDS = 2.0, 10.0
"""Between two looks, on a terminal and anywhere else, unless the user says otherwise."""


def watch(
    look: Callable[[], Status], out: TextIO, *, every: float | None = None, as_json: bool = False
) -> Status | None:
    """Show what `look` sees every so many seconds; returns what it saw last. Ctrl-C ends it, and is no error."""
    redraws = out.isatty() and not as_json
    pause = every if every is not None else SECONDS if out.isatty() else LOG_SECONDS
    status, last = None, CLEAR
    try:
        while status is None or not is_over(status):
            if status is not None:
                time.sleep(pause)
            status = look()
            if redraws:
                out.write(("" if last != CLEAR else CLEAR) + frame(status, shutil.get_terminal_size()))
                last = ""
            elif (text := json.dumps(status) if as_json else summary_line(status)) != last:
                out.write(text + "\n")
                last = text
            out.flush()
    except KeyboardInterrupt:
        out.write("\n" if redraws else "")
    return status


def frame(status: Status, size: os.terminal_size) -> str:
    """The screen over the one before it: every line to its end, and nothing below the last."""
    lines = screen(status, width=size.columns, height=size.lines)[: size.lines - 1]
    return HOME + "".join(f"{line}{TO_END_OF_LINE}\n" for line in lines) + TO_END_OF_SCREEN
