"""The embedded loop and the policies of failures, end to end in one process: real cells, a real store, real errors."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from flows import local, pool
from flows.home import Home
from flows.local import Summary, _Drive
from flows.messages import Outcome
from flows.mirror import Mirror
from flows.pool import WorkerPool, kernel_kills
from flows.stages import TRAIN
from flows.worker import _outcome, _Stop
from sparseforge_core.store.causes import POLICIES
from tests.flows.test_cycle import Workspace

WIDEST = 200
"""Outputs of the widest layer below the head of the tiny model."""


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr(local, "POLL_SECONDS", 0.01)
    return Workspace(tmp_path)


class InThisProcess:
    """Runs cells as a worker does, without a process; remembers in which order."""

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self.began: list[str] = []

    def __call__(self, key: str, stages: tuple[str, ...]) -> Outcome:
        self.began.append(key)
        for stage in stages:
            outcome = _outcome(stage, _Stop(), lambda s=stage: self.space.execute(key, s))  # type: ignore[misc]
            if outcome.status != "done":
                return outcome
        return Outcome("done")


def drive(space: Workspace, run: InThisProcess) -> Summary:
    states = space.states()
    summary = Summary("tiny-smoke", total=len({s.cell_key for s in states}))
    driven = _Drive(space.store, space.home, summary, Mirror(space.home, "tiny-smoke", states), run, None, quiet=True)
    driven.run_on(WorkerPool(space.home, 1))
    return summary


@contextlib.contextmanager
def raising(error: Callable[[], BaseException], times: int) -> Iterator[None]:
    """The next forwards of a model that trains raise."""
    left = [times]

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and module.out_features > WIDEST and output.requires_grad and left[0]:
            left[0] -= 1
            raise error()

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_disk_that_is_full_for_a_while_is_waited_for(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "unavailable", dataclasses.replace(POLICIES["unavailable"], wait=0.05))
    with raising(lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), times=2):
        summary = drive(space, InThisProcess(space))
    assert summary.complete
    assert [a.cause for a in space.store.attempts(space.first)] == ["unavailable", "unavailable", None]


def test_an_error_that_nobody_knows_is_tried_three_times_and_the_rest_goes_on(space: Workspace) -> None:
    forge = next(s.cell_key for s in space.states() if s.method == "sparseforge")
    space.execute(space.first)
    run = InThisProcess(space)
    with raising(lambda: ValueError("nobody knows"), times=99):
        summary = drive(space, run)
    assert summary.failed == {forge: "ValueError: nobody knows"}
    assert summary.reproduce[forge].endswith(f"reproduced/{forge}/train")
    assert [a.status for a in space.store.attempts(forge)] == ["failed"] * 3
    others = {s.status for s in space.states() if s.cell_key not in (forge, space.first)}
    assert others == {"done"}
    again = InThisProcess(space)
    assert drive(space, again).failed == summary.failed
    assert again.began == [], "the next run leaves it alone"


def test_what_ran_out_of_memory_comes_after_everything_else(space: Workspace) -> None:
    space.execute(space.first)
    forge = next(s.cell_key for s in space.states() if s.method == "sparseforge")
    run = InThisProcess(space)
    with raising(MemoryError, times=1):
        summary = drive(space, run)
    assert summary.complete
    assert run.began[0] == run.began[-1] == forge, run.began
    assert len(set(run.began[1:-1])) == 2
    assert [a.cause for a in space.store.attempts(forge) if a.stage == TRAIN] == ["out of memory", None]


def test_the_kernels_kills_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_kills() >= 0
    monkeypatch.setattr(pool, "VMSTAT", tmp_path / "vmstat")
    assert kernel_kills() == 0, "a system that does not tell"
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 3\n")
    assert kernel_kills() == 3


def test_a_home_is_not_touched_by_a_pool_that_ran_nothing(tmp_path: Path) -> None:
    idle = WorkerPool(Home.of(tmp_path / "home"), 2)
    idle.stop()
    assert idle.execute("a", (TRAIN,)).status == "interrupted"
    assert list(tmp_path.iterdir()) == []
