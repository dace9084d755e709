"""A Prefect server of our own for one embedded run: a child on a free loopback port that ends when we end.

Prefect's own temporary server outlives a parent that is killed, and takes unwritten task runs with it when it stops;
this one does neither. Does not import prefect.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from flows.home import Home
from sparseforge_core.errors import SparseForgeError

START_SECONDS = 120.0
"""A first start makes Prefect's database: about ten seconds on two idle cores, a minute on busy ones."""
STOP_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


class ServerError(SparseForgeError):
    """Prefect's server did not start, or the one asked for does not answer."""


@contextlib.contextmanager
def prefect_api(home: Home) -> Iterator[str]:
    """The address of a Prefect API: the one in $PREFECT_API_URL, else that of a server which lives for this block.

    Its records are in $PREFECT_HOME. Raises ServerError, with what to do, if there is no answer.
    """
    given = os.environ.get("PREFECT_API_URL")
    if given:
        if not _healthy(given):
            raise ServerError(
                f"PREFECT_API_URL={given} does not answer; start that server, or unset the variable to use one of our "
                "own, or leave Prefect out with --no-prefect"
            )
        yield given
        return
    log = home.root / "logs" / "prefect.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    process = _start(port, log)
    try:
        _wait(f"http://127.0.0.1:{port}/api", process, log)
        yield f"http://127.0.0.1:{port}/api"
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _start(port: int, log: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, so that Ctrl-C reaches us and not the server that our last records go to."""
    parent = os.getpid()

    def end_with_parent() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


def _wait(api: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _healthy(api):
        if process.poll() is not None or time.monotonic() > deadline:
            what = "ended" if process.poll() is not None else f"did not answer within {START_SECONDS:.0f} s"
            raise ServerError(f"Prefect's server {what}; {log} says why. Without Prefect: --no-prefect")
        time.sleep(0.2)


def _healthy(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api.rstrip('/')}/health", timeout=3):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
