"""Work done aside: calls in a few forked processes, while this one goes on with something else.

A fork shares what was read from the store without copying or pickling it; only results come back. Where forking is
not safe (other threads run, or the system is not Linux) or of no use (one core), the calls run here, one by one, and
give the same bytes.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from sparseforge_core.errors import SparseForgeError

Call = Callable[[str], Any]

_call: Call | None = None
"""In a forked process: what it was forked to do."""


def may_fork() -> bool:
    """Whether forked processes are safe here and would run beside this one."""
    return sys.platform == "linux" and threading.active_count() == 1 and len(os.sched_getaffinity(0)) > 1


@contextmanager
def aside(call: Call, names: Sequence[str]) -> Iterator[Callable[[str], Any]]:
    """Begin `call(name)` for every name; gives a function that waits for the result of one.

    What a call raises is raised where its result is asked for. Raises SparseForgeError if a process was killed.
    """
    processes = min(len(names), len(os.sched_getaffinity(0))) if may_fork() else 0
    if processes < 2:
        yield call
        return
    with warnings.catch_warnings():
        # Python 3.12 counts the idle threads of numerical libraries; ours is the only one that runs Python code.
        warnings.simplefilter("ignore", DeprecationWarning)
        with _forked(call, processes) as pool:
            begun: dict[str, Future[Any]] = {name: pool.submit(_run, name) for name in names}
            yield lambda name: _result(begun[name], name)


def _forked(call: Call, processes: int) -> Executor:
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_remember, initargs=(call,))


def _remember(call: Call) -> None:
    global _call
    _call = call
    gc.disable()  # its life is short, and a collection would copy the pages that it shares


def _run(name: str) -> Any:
    assert _call is not None
    return _call(name)


def _result(future: Future[Any], name: str) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise SparseForgeError(f"the process that made {name} was killed (out of memory?); try again") from error
