"""Progress on the terminal: cells done and left, what runs with its loss, and when it will be over."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

from flows.estimates import TRAINING, clock
from flows.messages import StepReport

LINE_SECONDS = 5.0
WIDTH = 180


class Progress:
    """One line that is redrawn on a terminal, and a line every few seconds anywhere else. Threads may share it."""

    def __init__(
        self, title: str, total: int, *, done: int = 0, quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        self.title, self.total, self.done, self.quiet = title, total, done, quiet
        self.stream = stream or sys.stderr
        self.running: dict[str, tuple[str, StepReport | None]] = {}
        self.first: dict[tuple[str, str], tuple[float, int]] = {}
        """Moment and step of the first report of a cell and stage: what its rate is counted from."""
        self.costs: dict[str, float] = {}
        """Estimated cost of cells, in any unit."""
        self.began = time.monotonic()
        self.shown = 0.0
        self.cost_done = 0.0
        self._last_note = ""
        self._lock = threading.RLock()

    def started(self, cell: str, label: str) -> None:
        """A cell began."""
        with self._lock:
            self.running[cell] = (label, None)
            self.first = {place: seen for place, seen in self.first.items() if place[0] != cell}
            self.show()

    def step(self, report: StepReport) -> None:
        """A running cell made a step or began a stage."""
        with self._lock:
            if report.cell in self.running:
                self.running[report.cell] = (self.running[report.cell][0], report)
                if report.steps:
                    self.first.setdefault((report.cell, report.stage), (time.monotonic(), report.step))
            self.show()

    def ended(self, cell: str, *, done: bool, note: str = "") -> None:
        """A cell ended, `done` if nothing of it is left; `note` is printed on a line of its own."""
        with self._lock:
            label, _ = self.running.pop(cell, (cell, None))
            if done:
                self.done += 1
                self.cost_done += self.costs.get(cell, 0.0)
            if note:
                self._line(f"  {label}: {note}")
            self.show(force=True)

    def note(self, text: str) -> None:
        """Say something once, on a line of its own."""
        with self._lock:
            if text != self._last_note:
                self._last_note = text
                self._line(f"{self.title}: {text}")

    def show(self, *, force: bool = False) -> None:
        """Draw, if it is time."""
        with self._lock:
            now = time.monotonic()
            terminal = self.stream.isatty()
            if self.quiet or (now - self.shown < (0.5 if terminal else LINE_SECONDS) and not (force and terminal)):
                return
            self.shown = now
            text = self._text(now)
            if terminal:
                self.stream.write(f"\r\x1b[2K{text[:WIDTH]}")
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
        begun = sum(self.costs.get(cell, 0.0) * _part(report) for cell, (_, report) in self.running.items())
        share = (self.cost_done + begun) / (sum(self.costs.values()) or 1.0)
        if share > 0.02:
            parts.append(f"about {clock((now - self.began) * (1 - share) / share)} left")
        cells = (f"[{label}{_where(report, self._rate(report, now))}]" for label, report in self.running.values())
        return "  ".join([*parts, *cells])

    def _rate(self, report: StepReport | None, now: float) -> float | None:
        """Steps a second of a stage since this line first heard of it; None before there are two reports."""
        if report is None or (report.cell, report.stage) not in self.first:
            return None
        began, step = self.first[report.cell, report.stage]
        return (report.step - step) / (now - began) if report.step > step and now > began else None

    def _line(self, text: str) -> None:
        if self.quiet:
            return
        if self.stream.isatty():
            self.stream.write("\r\x1b[2K")
        self.stream.write(text + "\n")
        self.stream.flush()


def _where(report: StepReport | None, rate: float | None) -> str:
    if report is None:
        return ""
    if not report.steps:
        return f": {report.stage.rpartition('-')[0] or report.stage}"  # a suite's key without its hash
    pace = "" if rate is None else f" {rate:.1f} steps/s" if rate >= 1 else f" {1 / rate:.1f} s/step"
    return f" {report.step}/{report.steps}{pace} loss {report.loss:.3f}"


def _part(report: StepReport | None) -> float:
    """How much of a cell is behind it, roughly: most of it is training."""
    if report is None:
        return 0.0
    if not report.steps:
        return 0.0 if report.stage == "train" else TRAINING
    return TRAINING * report.step / report.steps
