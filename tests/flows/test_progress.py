"""The progress line, and what the machine is found to have."""

from __future__ import annotations

import io
import threading

import pytest

from flows import devices
from flows.local import served_here
from flows.messages import StepReport
from flows.progress import Progress


def test_a_line_says_what_is_done_what_runs_and_how_long_it_takes() -> None:
    out = io.StringIO()
    progress = Progress("g", 3, stream=out)
    progress.costs = {"a": 1.0, "b": 1.0}
    progress.started("a", "llama dense s0")
    progress.step(StepReport("a", "train", 5, 10, 2.5))
    progress.shown = 0.0
    progress.show()
    assert "g: 0 of 3 cells  about 0:00 left  [llama dense s0 5/10 loss 2.500]" in out.getvalue()
    progress.step(StepReport("a", "zero-shot-7-021b20"))
    progress.shown = 0.0
    progress.show()
    assert "[llama dense s0: zero-shot-7]" in out.getvalue()
    progress.ended("a", done=True, note="train failed: no text")
    progress.shown = 0.0
    progress.show()
    assert "  llama dense s0: train failed: no text\n" in out.getvalue()
    assert out.getvalue().splitlines()[-1].startswith("g: 1 of 3 cells  about 0:0")


def test_a_line_says_how_fast_a_cell_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    out = io.StringIO()
    progress = Progress("g", 1, stream=out)

    def line_at(moment: float, step: int) -> str:
        nonlocal now
        now = moment
        progress.step(StepReport("a", "train", step, 100, 2.5))
        return out.getvalue().splitlines()[-1]

    progress.started("a", "llama")
    assert line_at(10.0, 20).endswith("[llama 20/100 loss 2.500]"), "one report has no rate"
    assert line_at(20.0, 60).endswith("[llama 60/100 4.0 steps/s loss 2.500]")
    progress.started("a", "llama")
    assert line_at(30.0, 60).endswith("[llama 60/100 loss 2.500]"), "what went on from a checkpoint is counted anew"
    assert line_at(70.0, 62).endswith("[llama 62/100 20.0 s/step loss 2.500]")


def test_quiet_says_nothing_and_lines_are_rare() -> None:
    quiet, loud = io.StringIO(), io.StringIO()
    for stream, silent in ((quiet, True), (loud, False)):
        progress = Progress("g", 3, quiet=silent, stream=stream)
        for step in range(100):
            progress.started(f"c{step}", "cell")
        progress.close()
    assert quiet.getvalue() == ""
    assert len(loud.getvalue().splitlines()) == 1


def test_threads_may_report_while_cells_come_and_go() -> None:
    progress = Progress("g", 3, stream=io.StringIO())
    errors: list[BaseException] = []

    def report(name: str) -> None:
        try:
            for step in range(300):
                progress.started(f"{name}{step}", "cell")
                progress.step(StepReport(f"{name}{step}", "train", step, 300, 1.0))
                progress.shown = 0.0
                progress.ended(f"{name}{step}", done=True)
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=report, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert progress.done == 1200


@pytest.mark.parametrize(
    ("value", "expected"), [("", []), ("-1", []), ("0", ["0"]), ("2, 5", ["2", "5"]), ("1,-1,2", ["1"])]
)
def test_visible_gpus_are_those_that_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert devices.gpus() == expected
    assert devices.default_workers() == (len(expected) or min(devices.CPU_WORKERS, devices.cores()))
    assert served_here("cpu")
    assert served_here("gpu-1") == bool(expected)
    assert not served_here("gpu-8")
