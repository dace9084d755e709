"""Work done aside: one forked process beside this one, which gets ready while this one is still reading.

What is handed over and what comes back is pickled, so it should be small. Where forking is not safe (other threads
run, or the system is not Linux) or of no use (one core), the calls run here when their results are asked for, and give
the same.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from sparseforge_core.errors import SparseForgeError

Result = Callable[[], Any]
Submit = Callable[[str, Callable[..., Any], Any], Result]
"""(name, function, argument): begins a call; what it gives waits for the result."""
TICKET = 2
"""Bytes of an argument's number; a pipe on Linux holds 65,536 bytes, which is 32,768 of them."""


def may_fork() -> bool:
    """Whether a forked process is safe here and would run beside this one."""
    return sys.platform == "linux" and threading.active_count() == 1 and len(os.sched_getaffinity(0)) > 1


def here(_: str, call: Callable[..., Any], argument: Any) -> Result:
    """Submit a call to nobody: it runs in this process, when its result is asked for."""
    return lambda: call(argument)


@contextmanager
def aside(ready: Callable[[], None] = lambda: None) -> Iterator[Submit]:
    """A process that begins with `ready()` now, and then does what it is given, one call after another.

    What a call raises is raised where its result is asked for. Raises SparseForgeError there if the process was killed.
    """
    if not may_fork():
        yield here
        return
    with warnings.catch_warnings():
        # Python 3.12 counts the idle threads of numerical libraries; ours is the only one that runs Python code.
        warnings.simplefilter("ignore", DeprecationWarning)
        fork = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(1, mp_context=fork, initializer=_begin, initargs=(ready,))
        pool.submit(int)  # forks

    def submit(name: str, call: Callable[..., Any], argument: Any) -> Result:
        future: Future[Any] = pool.submit(call, argument)
        return lambda: _result(future, name)

    try:
        yield submit
    finally:
        pool.shutdown(cancel_futures=True)


def shared_out(name: str, call: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
    """What `call` gives for each argument, in order: this process and one aside each take the next one when free.

    Long calls should come first. The numbers of the arguments wait in a pipe, from which either process reads one.
    """
    if len(arguments) < 2:
        return [call(argument) for argument in arguments]
    tickets, fill = os.pipe()
    try:
        with os.fdopen(fill, "wb") as pipe:
            pipe.write(b"".join(number.to_bytes(TICKET) for number in range(len(arguments))))
        with aside() as submit:
            there = submit(name, _take, (tickets, call, arguments))
            found = _take((tickets, call, arguments)) | there()
    finally:
        os.close(tickets)
    return [found[number] for number in range(len(arguments))]


def _take(work: tuple[int, Callable[[Any], Any], Sequence[Any]]) -> dict[int, Any]:
    tickets, call, arguments = work
    found = {}
    while ticket := os.read(tickets, TICKET):
        number = int.from_bytes(ticket)
        found[number] = call(arguments[number])
    return found


@contextmanager
def hasty() -> Iterator[None]:
    """No garbage collections for a while: thousands of records are made at once, all of which are still needed."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _begin(ready: Callable[[], None]) -> None:
    gc.disable()  # its life is short, and a collection would copy the pages that it shares
    ready()


def _result(future: Future[Any], name: str) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise SparseForgeError(f"the process that made {name} was killed (out of memory?); try again") from error
