#!/usr/bin/env python3
"""The Prefect stack of one machine without containers: server, deployments and workers, in one command.

    .venv/bin/python infra/stack.py                                   until Ctrl-C
    .venv/bin/python infra/stack.py --run sparseforge/full-grid       until that run has ended, with its exit code

Every process is a child of this one and ends with it. Logs are in HOME/logs. Needs nothing but the standard library;
Prefect runs in the interpreter that runs this.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 180.0
STOP_SECONDS = 90.0
"""For workers, whose cells write a checkpoint first."""
PR_SET_PDEATHSIG = 1


class StackError(Exception):
    """Something did not start, or ended on its own; the message says what to look at."""


class Stack:
    """The processes, in the order in which they were started; used as a context, it ends them in reverse."""

    def __init__(self, home: Path, port: int) -> None:
        self.logs, self.port = home / "logs", port
        self.api = f"http://127.0.0.1:{port}/api"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false"}
        self.environment = {
            **os.environ,
            **quiet,
            "DO_NOT_TRACK": "true",
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_API_URL": self.api,
            "PREFECT": f"{sys.executable} -m prefect",
            "PREFECT_WORKER_QUERY_SECONDS": os.environ.get("PREFECT_WORKER_QUERY_SECONDS", "2"),
            "SPARSEFORGE_HOME": str(home),
        }
        self.logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        workers = [process for name, process in self.processes.items() if name != "server"]
        _end(workers, STOP_SECONDS)
        _end(list(self.processes.values()), 15.0)

    def start(self, name: str, *command: str, **environment: str) -> None:
        """Start a child with a log file of its own; it gets SIGTERM when we are gone, however that happens."""

        def own_signals() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a worker ends itself by it, and background jobs ignore it
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

        with (self.logs / f"stack-{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: we end the others in order
                preexec_fn=own_signals,
            )

    def serve(self) -> None:
        """Start the server, wait until it answers, create pools and deployments."""
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                raise StackError(f"port {self.port} is taken; is a stack running already? Otherwise use --port")
        serving = (sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        self.start("server", *serving)
        self._wait("the server", lambda: self._ask("GET", "/health") is True)
        registering = ["bash", str(ROOT / "infra" / "register.sh")]
        done = subprocess.run(registering, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise StackError(f"infra/register.sh failed:\n{done.stdout}{done.stderr}")

    def work(self, pool: str) -> None:
        """Start the workers of a pool and wait until they poll: one a GPU for gpu-1, else one."""
        limit = "8" if pool == "grids" else "1"
        devices = [str(index) for index in range(_gpus())] if pool == "gpu-1" else [""]
        for device in devices:
            pinned = {"CUDA_VISIBLE_DEVICES": device} if device else {}
            name = f"{pool}-{device}".rstrip("-")
            self.start(name, "bash", str(ROOT / "infra" / "worker.sh"), pool, limit, **pinned)
        self._wait(f"workers of {pool}", lambda: self._online(pool) >= len(devices))

    def check(self) -> None:
        """Raises StackError if a child has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                log = self.logs / f"stack-{name}.log"
                raise StackError(f"{name} ended with code {process.returncode}; {log} says why")

    def _wait(self, what: str, answered: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not answered():
            self.check()
            if time.monotonic() > deadline:
                raise StackError(f"{what} did not answer within {START_SECONDS:.0f} s; see {self.logs}")
            time.sleep(0.3)

    def _online(self, pool: str) -> int:
        workers = self._ask("POST", f"/work_pools/{pool}/workers/filter", {})
        return sum(worker["status"] == "ONLINE" for worker in workers) if isinstance(workers, list) else 0

    def _ask(self, method: str, path: str, body: object = None) -> object:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.api + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.load(answer)
        except (urllib.error.URLError, OSError):  # not up yet
            return None


def _end(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return done.stdout.count("GPU ") if done.returncode == 0 else 0


def main() -> int:
    """Start, say how to use it, wait."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=4200, help="of the Prefect server, on loopback (default 4200)")
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("SPARSEFORGE_HOME", "runs")))
    parser.add_argument(
        "--pools", nargs="+", help="pools to work for (default: grids, cpu, and gpu-1 if there is a GPU)"
    )
    parser.add_argument("--run", metavar="DEPLOYMENT", help="run this deployment, then end")
    parser.add_argument("-p", "--param", action="append", default=[], metavar="NAME=VALUE", help="parameter of the run")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pools = options.pools or ["grids", "cpu", *(["gpu-1"] if _gpus() else [])]
    try:
        with Stack(options.home.resolve(), options.port) as stack:
            stack.serve()
            for pool in pools:
                stack.work(pool)
            print(
                f"ready: http://127.0.0.1:{options.port}, workers for {', '.join(pools)}", file=sys.stderr, flush=True
            )
            if options.run:
                return _run(stack, options.run, options.param)
            _say(f"  export PREFECT_API_URL={stack.api}")
            _say("  prefect deployment run sparseforge/full-grid --watch")
            _say("Ctrl-C ends all of it; unfinished cells save a checkpoint.")
            while True:
                time.sleep(1.0)
                stack.check()
    except StackError as error:
        _say(f"stack: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run(stack: Stack, deployment: str, parameters: list[str]) -> int:
    given = [part for parameter in parameters for part in ("-p", parameter)]
    command = [sys.executable, "-m", "prefect", "deployment", "run", deployment, *given, "--watch"]
    return subprocess.run(command, env=stack.environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
