"""Calls in forked processes: the same results as here, errors where they are asked for, a killed process named."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path

import pytest

from analysis import aside as module
from analysis.aside import aside, hasty, may_fork, shared_out
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


def doubled(name: str) -> tuple[str, int]:
    return name * 2, os.getpid()


def refused_if_bad(name: str) -> str:
    if name == "bad":
        raise SparseForgeError("no such column")
    return name


def killed(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nested(names: list[str]) -> list[tuple[str, int]]:
    with aside() as submit:
        results = [submit(name, doubled, name) for name in names]
        return [doubled("here"), *(result() for result in results)]


def test_every_call_gets_its_own_result(forked: bool) -> None:
    with aside() as submit:
        waiting = {name: submit(name, doubled, name) for name in ("a", "b", "c")}
        found = [waiting[name]() for name in ("c", "a", "b")]
    assert [text for text, _ in found] == ["cc", "aa", "bb"]
    assert all(pid != os.getpid() for _, pid in found) == forked


def test_it_gets_ready_before_the_first_call(forked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with aside(lambda: monkeypatch.setenv("SPARSEFORGE_READY", "yes")) as submit:
        assert submit("a", os.getenv, "SPARSEFORGE_READY")() == ("yes" if forked else None)


def test_a_process_aside_may_have_one_of_its_own(forked: bool) -> None:
    with aside() as submit:
        found = submit("all", nested, ["a", "b"])()
    assert [text for text, _ in found] == ["herehere", "aa", "bb"]
    assert len({pid for _, pid in found} | {os.getpid()}) == (3 if forked else 1)


def test_an_error_is_raised_where_its_result_is_asked_for(forked: bool) -> None:
    with aside() as submit:
        good, bad = submit("one", refused_if_bad, "good"), submit("two", refused_if_bad, "bad")
        assert good() == "good"
        with pytest.raises(SparseForgeError, match="no such column"):
            bad()


def test_a_killed_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "may_fork", lambda: True)
    with (
        aside() as submit,
        pytest.raises(SparseForgeError, match="the process that made the figures was killed"),
    ):
        submit("the figures", killed, "")()


def test_collections_are_off_for_a_while_and_back_even_after_an_error() -> None:
    assert gc.isenabled()
    with pytest.raises(SparseForgeError), hasty():
        refused_if_bad("good" if gc.isenabled() else "bad")
    assert gc.isenabled()
    gc.disable()
    try:
        with hasty():
            pass
        assert not gc.isenabled(), "it was off before"
    finally:
        gc.enable()


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


def test_calls_are_shared_out_and_come_back_in_order(forked: bool) -> None:
    found = shared_out("the letters", doubled, list("abcdefgh"))
    assert [text for text, _ in found] == [letter * 2 for letter in "abcdefgh"]
    assert os.getpid() in {pid for _, pid in found} or forked
    assert len({pid for _, pid in found}) <= (2 if forked else 1)
    assert shared_out("one", doubled, ["a"]) == [("aa", os.getpid())]
    assert shared_out("none", doubled, []) == []


@pytest.mark.parametrize("names", [["bad", "good"], ["good", "good", "bad"]])
def test_an_error_in_shared_out_calls_is_raised(forked: bool, names: list[str]) -> None:
    with pytest.raises(SparseForgeError, match="no such column"):
        shared_out("the names", refused_if_bad, names)
    assert len(os.listdir("/proc/self/fd")) < 200, "the pipe is closed"
