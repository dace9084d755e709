#!/usr/bin/env python3
"""The whole stack of docker-compose.yml on this machine without containers, in one command.

    make stack                                                        until Ctrl-C
    .venv/bin/python infra/stack.py --run sparseforge/full-grid       until that run has ended, with its exit code

Each service runs the compose file's own command as a process: PostgreSQL, Prefect's server, MLflow's server, the
registration, one worker for each device set. Every process is a child of this one and ends with it; logs are
HOME/logs/stack-*.log. Secrets come from the environment, else from HOME/stack/secrets.env, drawn at the first start.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import postgres
from native import ROOT, Service, StackError, free_port, services

START_SECONDS = 240.0
STOP_SECONDS = 90.0
"""For workers, whose cells write a checkpoint first."""
SERVERS = ("postgres", "prefect", "mlflow")
PORTS = {"postgres": "SPARSEFORGE_DB_PORT", "prefect": "SPARSEFORGE_PREFECT_PORT", "mlflow": "SPARSEFORGE_MLFLOW_PORT"}
HEALTHY, COMPLETED = "service_healthy", "service_completed_successfully"
PR_SET_PDEATHSIG = 1
QUIET = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}
"""What the images say."""


class Stack:
    """The processes, in the order in which they were started; used as a context, it ends them in reverse."""

    def __init__(self, home: Path) -> None:
        self.home, self.logs = home, home / "logs"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.once: set[str] = set()
        """Services that are meant to end."""
        self.environment = {
            **os.environ,
            **QUIET,
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT": f"{sys.executable} -m prefect",
            "PYTHON": sys.executable,
            "SPARSEFORGE_HOME": str(home),
            "SPARSEFORGE_CHECKOUT": str(ROOT),
        }
        self.logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        workers = [process for name, process in self.processes.items() if name not in SERVERS]
        _end(workers, STOP_SECONDS)
        for name in ("prefect", "mlflow", "postgres"):
            if name in self.processes:
                # PostgreSQL waits for its clients after SIGTERM; after SIGINT it ends their sessions.
                _end([self.processes[name]], 20.0, signal.SIGINT if name == "postgres" else signal.SIGTERM)

    def bring_up(self, chosen: list[Service]) -> None:
        """Start each service as soon as what it needs is there; returns when all are healthy, or done if meant to end.

        Raises StackError when one does not get there.
        """
        waiting = list(chosen)
        reached: dict[str, str] = {}  # service -> the condition that it has reached
        deadline = time.monotonic() + START_SECONDS
        while len(reached) < len(chosen):
            for service in [s for s in waiting if s.needs.items() <= reached.items()]:
                waiting.remove(service)
                self._begin(service)
            for service in chosen:
                if service not in waiting and service.name not in reached and self._reached(service):
                    reached[service.name] = COMPLETED if service.once else HEALTHY
            self.check()
            if time.monotonic() > deadline:
                late = [service.name for service in chosen if service.name not in reached]
                raise StackError(f"{', '.join(late)}: not there after {START_SECONDS:.0f} s; see {self.logs}")
            time.sleep(0.3)

    def _begin(self, service: Service) -> None:
        if service.name in PORTS:
            self._refuse_taken(service)
        change = None
        if service.name == "postgres":
            service, change = self._cluster(service)
        service.folder.mkdir(parents=True, exist_ok=True)
        if service.once:
            self.once.add(service.name)
        self.start(service.name, *service.command, folder=service.folder, change=change, **service.environment)

    def _reached(self, service: Service) -> bool:
        """Whether it is healthy, or has ended well if it is meant to end."""
        if service.once:
            return self.processes[service.name].poll() == 0
        if service.name == "postgres":
            return self._databases(service)
        asking = {**self.environment, **service.environment}
        done = subprocess.run(service.health, env=asking, cwd=ROOT, capture_output=True, timeout=30, check=False)
        return done.returncode == 0

    def _databases(self, service: Service) -> bool:
        """The image runs init.sql before it says that it is healthy; so do we."""
        port, environment = self.environment[PORTS["postgres"]], service.environment
        if not postgres.answers(port):
            return False
        postgres.make_databases(port, environment["POSTGRES_USER"], environment["POSTGRES_PASSWORD"])
        return True

    def start(
        self,
        name: str,
        *command: str,
        folder: Path = ROOT,
        change: Callable[[], None] | None = None,
        **environment: str,
    ) -> None:
        """Start a child with a log file of its own; it gets SIGTERM when we are gone, however that happens."""
        parent = os.getpid()

        def own_signals() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a worker ends itself by it, and background jobs ignore it
            if change is not None:
                change()
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # last: a change of user forgets it
            if os.getppid() != parent:
                os._exit(1)

        with (self.logs / f"stack-{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=folder,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: we end the others in order
                preexec_fn=own_signals,
            )

    def check(self) -> None:
        """Raises StackError if a child has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None and not (name in self.once and process.returncode == 0):
                log = self.logs / f"stack-{name}.log"
                raise StackError(f"{name} ended with code {process.returncode}; {log} says why")

    def _refuse_taken(self, service: Service) -> None:
        port = self.environment[PORTS[service.name]]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(port))) == 0:
                raise StackError(
                    f"port {port} is taken; is a stack running already? Otherwise set {PORTS[service.name]} to another"
                )

    def _cluster(self, service: Service) -> tuple[Service, Callable[[], None]]:
        data = self.home / "stack" / "postgres"
        user, password = service.environment["POSTGRES_USER"], service.environment["POSTGRES_PASSWORD"]
        data.mkdir(parents=True, exist_ok=True)
        postgres.make_cluster(data, user, password)
        command = postgres.command(service.command, data, self.environment[PORTS["postgres"]])
        return replace(service, command=command, folder=data), postgres.become(postgres.owner(data))


def _end(processes: list[subprocess.Popen[bytes]], seconds: float, number: signal.Signals = signal.SIGTERM) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def secrets(home: Path) -> dict[str, str]:
    """What the environment lacks of the secrets, from a file of ours that only its owner may read."""
    path = home / "stack" / "secrets.env"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = subprocess.run(["bash", str(ROOT / "infra" / "secrets.sh")], capture_output=True, text=True, check=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(drawn.stdout)
    lines = dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
    return {name: value for name, value in lines.items() if name not in os.environ}


def device_sets() -> dict[str, list[str]]:
    """Profile -> the devices of each of its workers: all cores, each GPU, and eight GPUs together where there are."""
    sys.path.insert(0, str(ROOT))
    from flows.devices import gpus

    found = gpus()
    return {
        "cpu": [""],
        **({"gpu": found} if found else {}),
        **({"gpu-8": [",".join(found[:8])]} if len(found) >= 8 else {}),
    }


def one_for_each_device_set(chosen: list[Service]) -> list[Service]:
    """The services, with a worker for each device set of its profile: `worker-gpu` becomes `worker-gpu-0`, …"""
    sets, found = device_sets(), []
    for service in chosen:
        own = [devices for profile in service.profiles for devices in sets.get(profile, [""])] or [""]
        found += [_on(service, devices, index if len(own) > 1 else None) for index, devices in enumerate(own)]
    return found


def _on(service: Service, devices: str, index: int | None) -> Service:
    environment = {**service.environment, **({"CUDA_VISIBLE_DEVICES": devices} if devices else {})}
    if index is None:
        return replace(service, environment=environment)
    old, port = service.environment["PREFECT_WORKER_WEBSERVER_PORT"], str(free_port())
    return replace(
        service,
        name=f"{service.name}-{index}",
        environment={**environment, "PREFECT_WORKER_WEBSERVER_PORT": port},
        health=tuple(part.replace(f":{old}/", f":{port}/") for part in service.health),
    )


def client_lines(home: Path, environment: dict[str, str], names: list[str]) -> Path:
    """HOME/stack/client.env: what a shell exports to talk to the stack, readable by its owner alone."""
    path = home / "stack" / "client.env"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.writelines(f"export {name}={shlex.quote(environment[name])}\n" for name in names if name in environment)
    return path


CLIENT = [
    "PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD", "SPARSEFORGE_DB", "SPARSEFORGE_HOME", "PREFECT_HOME",
]  # fmt: skip


def main() -> int:
    """Start, say how to use it, wait."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("SPARSEFORGE_HOME", "runs")))
    parser.add_argument(
        "--profile", action="append", help="cpu, gpu or gpu-8: workers to start (default: those whose devices are here)"
    )
    parser.add_argument("--without", action="append", default=[], metavar="SERVICE", help="leave this service out")
    parser.add_argument("--run", metavar="DEPLOYMENT", help="run this deployment, then end")
    parser.add_argument("-p", "--param", action="append", default=[], metavar="NAME=VALUE", help="parameter of the run")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    home = options.home.resolve()
    began = time.monotonic()
    try:
        with Stack(home) as stack:
            stack.environment |= secrets(home)
            for name, variable in PORTS.items():
                stack.environment.setdefault(variable, {"postgres": "5432", "prefect": "4200", "mlflow": "5000"}[name])
            profiles = tuple(options.profile or device_sets())
            chosen = [s for s in services(home, stack.environment, profiles) if s.name not in options.without]
            stack.bring_up(one_for_each_device_set(chosen))
            client = client_of(stack)
            path = client_lines(home, client, CLIENT)
            seconds = time.monotonic() - began
            _say(f"ready after {seconds:.0f} s: {client['PREFECT_API_URL']}, {client['MLFLOW_TRACKING_URI']}")
            if options.run:
                return _run(client, options.run, options.param)
            _say(f"  source {path}")
            _say("  .venv/bin/prefect deployment run sparseforge/full-grid --watch")
            _say("Ctrl-C ends all of it; unfinished cells save a checkpoint.")
            while True:
                time.sleep(1.0)
                stack.check()
    except StackError as error:
        _say(f"stack: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def client_of(stack: Stack) -> dict[str, str]:
    """The environment of a client: that of the service `register`, which is one."""
    (register,) = (s for s in services(stack.home, stack.environment) if s.name == "register")
    return {**stack.environment, **register.environment}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run(environment: dict[str, str], deployment: str, parameters: list[str]) -> int:
    given = [part for parameter in parameters for part in ("-p", parameter)]
    command = [sys.executable, "-m", "prefect", "deployment", "run", deployment, *given, "--watch"]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
