"""Progress on the terminal: cells done and left, what runs with its loss, and when it will be over."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from flows.pool import StepReport

LINE_SECONDS = 5.0


class Progress:
    """One line that is redrawn on a terminal, and a line every few seconds anywhere else."""

    def __init__(self, title: str, total: int, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.title, self.total, self.quiet = title, total, quiet
        self.stream = stream or sys.stderr
        self.done = 0
        self.running: dict[str, tuple[str, StepReport | None]] = {}
        self.began = time.monotonic()
        self.shown = 0.0
        self.cost_done = 0.0
        self.cost_total = 0.0

    def started(self, cell: str, label: str) -> None:
        """A cell began."""
        self.running[cell] = (label, None)

    def step(self, report: StepReport) -> None:
        """A running cell made a step."""
        if report.cell in self.running:
            self.running[report.cell] = (self.running[report.cell][0], report)
        self.show()

    def ended(self, cell: str, cost: float, *, note: str = "") -> None:
        """A cell ended; `note` is printed on a line of its own."""
        label, _ = self.running.pop(cell, (cell, None))
        self.done += 1
        self.cost_done += cost
        if note:
            self._line(f"  {label}: {note}")
        self.show(force=True)

    def show(self, *, force: bool = False) -> None:
        """Draw, if it is time."""
        now = time.monotonic()
        terminal = self.stream.isatty()
        if self.quiet or (now - self.shown < (0.5 if terminal else LINE_SECONDS) and not (force and terminal)):
            return
        self.shown = now
        text = self._text(now)
        if terminal:
            self.stream.write(f"\r\x1b[2K{text[:180]}")
            self.stream.flush()
        else:
            self._line(text)

    def close(self) -> None:
        """End the line."""
        if not self.quiet and self.stream.isatty():
            self.stream.write("\r\x1b[2K")
            self.stream.flush()

    def _text(self, now: float) -> str:
        parts = [f"{self.title}: {self.done} of {self.total} cells"]
        share = self.cost_done / self.cost_total if self.cost_total else 0.0
        if share > 0.02:
            parts.append(f"about {_clock((now - self.began) * (1 - share) / share)} left")
        for label, report in self.running.values():
            where = f" {report.step}/{report.steps} loss {report.loss:.3f}" if report else ""
            parts.append(f"[{label}{where}]")
        return "  ".join(parts)

    def _line(self, text: str) -> None:
        if self.quiet:
            return
        if self.stream.isatty():
            self.stream.write("\r\x1b[2K")
        self.stream.write(text + "\n")
        self.stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
