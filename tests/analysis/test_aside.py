"""Calls in forked processes: the same results as here, errors where they are asked for, a killed process named."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from analysis import aside as module
from analysis.aside import aside, may_fork
from analysis.make_tables import make_tables
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.store.results import Results
from tests.analysis.filled import everything


@pytest.fixture(params=[False, True], ids=["here", "forked"])
def forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    wanted: bool = request.param
    monkeypatch.setattr(module, "may_fork", lambda: wanted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    return wanted


def test_every_name_gets_its_own_result(forked: bool) -> None:
    with aside(lambda name: (name * 2, os.getpid()), ["a", "b", "c"]) as result:
        found = [result(name) for name in ("c", "a", "b")]
    assert [text for text, _ in found] == ["cc", "aa", "bb"]
    assert any(pid != os.getpid() for _, pid in found) == forked


def test_an_error_is_raised_where_its_result_is_asked_for(forked: bool) -> None:
    def call(name: str) -> str:
        if name == "bad":
            raise SparseForgeError("no such column")
        return name

    with aside(call, ["good", "bad"]) as result:
        assert result("good") == "good"
        with pytest.raises(SparseForgeError, match="no such column"):
            result("bad")


def test_a_killed_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "may_fork", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with (
        aside(lambda _: os.kill(os.getpid(), signal.SIGKILL), ["first", "second"]) as result,
        pytest.raises(SparseForgeError, match="the process that made first was killed"),
    ):
        result("first")


def test_nobody_forks_beside_other_threads() -> None:
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    try:
        assert not may_fork()
    finally:
        ended.set()
        other.join()


def test_figures_drawn_aside_have_the_same_bytes(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything().write(sqlite_url).close()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    made = []
    for forks in (False, True):
        monkeypatch.setattr(module, "may_fork", lambda forks=forks: forks)
        report = make_tables(Results(sqlite_url), None, tmp_path / str(forks))
        made.append({path.relative_to(tmp_path / str(forks)): path.read_bytes() for path in report.files})
    assert made[0] == made[1]
    assert sum(path.parts[0] == "figures" for path in made[0]) >= 8
