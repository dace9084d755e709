"""docker-compose.yml read as processes of this machine: the same commands, variables, order and health checks.

What a container's name, port and path are inside Docker becomes an address of loopback, a published port and a folder
of the stack's home. Images are not: Python programs run in the interpreter that reads this, and PostgreSQL is the one
that the system has (`postgres.py`).
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = ROOT / "docker-compose.yml"


class StackError(Exception):
    """Something did not start, or ended on its own; the message says what to look at."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """One service, ready to be started here."""

    name: str
    image: str
    command: tuple[str, ...]
    environment: dict[str, str]
    folder: Path
    """Working folder."""
    needs: dict[str, str]
    """Service -> condition, as Compose writes it."""
    health: tuple[str, ...]
    """A command that succeeds when the service can be used; empty where none is asked."""
    profiles: tuple[str, ...]
    once: bool
    """Whether it is meant to end, and well."""


def expand(text: str, environment: Mapping[str, str]) -> str:
    """`${NAME}`, `${NAME:-default}`, `${NAME:?complaint}`, `$$` as in Compose. Raises StackError if it complains."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        found = environment.get(match["name"], "")
        if not found and match["how"] == "?":
            raise StackError(f"{match['name']} is not set: {match['rest']}; infra/secrets.sh draws such secrets")
        return found or (match["rest"] if match["how"] == "-" else "")

    return re.sub(r"\$\$|\$\{(?P<name>\w+)(?::(?P<how>[-?])(?P<rest>[^}]*))?\}", value, text)


def services(
    home: Path, environment: Mapping[str, str], profiles: tuple[str, ...] = (), file: Path = COMPOSE
) -> list[Service]:
    """The services of the file that have no profile or one of these, each after those that it needs.

    Raises StackError for a variable that is asked for and not set.
    """
    body: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text())["services"]
    chosen = {n: b for n, b in body.items() if not b.get("profiles") or set(b["profiles"]) & set(profiles)}
    chosen = {name: _expanded(service, environment) for name, service in chosen.items()}
    addresses = dict(_addresses(chosen))
    return [_service(name, chosen[name], addresses, home, file.parent) for name in _in_order(chosen)]


def _expanded(value: Any, environment: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _expanded(item, environment) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, environment) for item in value]
    return expand(value, environment) if isinstance(value, str) else value


def _addresses(chosen: dict[str, dict[str, Any]]) -> Iterator[tuple[tuple[str, str], str]]:
    """(service, port inside) -> port here, for each published port."""
    for name, service in chosen.items():
        for port in service.get("ports", []):
            host, here, inside = port.split(":")
            if host != "127.0.0.1":
                raise StackError(f"{name} publishes {port}: only loopback (127.0.0.1:HERE:INSIDE) runs natively")
            yield (name, inside), here


def _in_order(chosen: dict[str, dict[str, Any]]) -> list[str]:
    """Names such that each comes after what it needs."""
    order: list[str] = []

    def add(name: str) -> None:
        for needed in chosen[name].get("depends_on", {}):
            add(needed)
        if name not in order:
            order.append(name)

    for name in chosen:
        add(name)
    return order


def _service(
    name: str, body: dict[str, Any], addresses: dict[tuple[str, str], str], home: Path, beside: Path
) -> Service:
    environment = {key: str(value) for key, value in body.get("environment", {}).items()}
    own = {inside: here for (service, inside), here in addresses.items() if service == name}
    if web := environment.get("PREFECT_WORKER_WEBSERVER_PORT"):  # not published: each worker of a machine has its own
        own[web] = str(free_port())
        environment |= {"PREFECT_WORKER_WEBSERVER_PORT": own[web], "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1"}
    folders = _folders(body.get("volumes", []), home, beside)
    others = {f"{service}:{inside}": f"127.0.0.1:{here}" for (service, inside), here in addresses.items()}

    def here(text: str) -> str:
        return _replaced(text, others, folders)

    def here_inside(text: str) -> str:
        """In a command of the service, which also speaks of itself: `127.0.0.1:8080`, `--port 4200`."""
        loopback = {f"127.0.0.1:{inside}": f"127.0.0.1:{port}" for inside, port in own.items()}
        text = _replaced(text, {**others, **loopback}, folders).replace("0.0.0.0", "127.0.0.1")
        return re.sub(r"(?<=--port=)\d+|(?<=-p )\d+|^\d+$", lambda match: own.get(match[0], match[0]), text)

    test = [here_inside(part) for part in body.get("healthcheck", {}).get("test", [])]
    health = ("bash", "-c", test[1]) if test[:1] == ["CMD-SHELL"] else tuple(test[1:])
    return Service(
        name=name,
        image=body["image"],
        command=_program(tuple(here_inside(part) for part in body["command"])),
        environment={key: here(value) for key, value in environment.items()},
        folder=Path(here(body["working_dir"])) if "working_dir" in body else ROOT,
        needs={other: how["condition"] for other, how in body.get("depends_on", {}).items() if other != name},
        health=_program(health),
        profiles=tuple(body.get("profiles", ())),
        once=body.get("restart") == "no",
    )


def _folders(volumes: list[str], home: Path, beside: Path) -> dict[str, str]:
    """Path inside -> path here. The project's own volume is the home itself; others have a folder in HOME/stack."""
    found = {}
    for volume in volumes:
        source, inside = volume.split(":")[:2]
        if source.startswith("."):
            found[inside] = str((beside / source).resolve())
        else:
            found[inside] = str(home if source == "home" else home / "stack" / source)
    return found


def _replaced(text: str, addresses: dict[str, str], folders: dict[str, str]) -> str:
    """All in one pass, so that what was put in is not taken for something to replace."""
    table = {**addresses, **folders}
    names = "|".join(re.escape(name) for name in sorted(table, key=len, reverse=True))
    return re.sub(rf"(?<![\w.-])(?:{names})(?![\w])", lambda match: table[match[0]], text) if table else text


def _program(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command with this interpreter in place of the image's, and this folder's scripts by their path."""
    if not command:
        return command
    if command[0] == "python":
        return (sys.executable, *command[1:])
    if command[0] in ("prefect", "mlflow"):
        return (sys.executable, "-m", *command)
    script = ROOT / command[0]
    return ("bash", str(script), *command[1:]) if script.suffix == ".sh" and script.is_file() else command


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
