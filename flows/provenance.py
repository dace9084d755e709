"""Provenance: which code, machine and command made an attempt."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

from sparseforge_core.store.rows import Provenance

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
RESULTS = "results"
"""The folder of the checkout with what its code has measured."""


@functools.cache
def provenance(device: str = "cpu", flow_run_id: str = "") -> Provenance:
    """Of this process."""
    sha, diff = state_of(ROOT)
    return Provenance(
        git_sha=sha,
        dirty=bool(diff),
        diff_sha=diff,
        lock_sha=hashlib.sha256(LOCK.read_bytes()).hexdigest() if LOCK.is_file() else "",
        host=here(),
        device=device,
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        pid=os.getpid(),
        flow_run_id=flow_run_id,
    )


@functools.cache
def here() -> str:
    """This machine since it booted, as `NAME/` and a hash of its boot and of our namespace of process numbers.

    A process number of another boot, or of another container, says nothing here, whatever the machines are called.
    Where the system names neither, the name stands alone.
    """
    name = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        return name
    return f"{name}/{hashlib.sha256(f'{boot} {numbers}'.encode()).hexdigest()[:8]}"


def machine_of(host: str) -> str:
    """The name of the machine in what `here` said there."""
    return host.partition("/")[0]


def process_alive(pid: int) -> bool:
    """Whether a process of this machine exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def state_of(checkout: Path) -> tuple[str, str]:
    """(commit, hash of how tracked files differ from it, empty if they do not); both empty outside a checkout.

    Results are not looked at: a store that is kept in the checkout differs as soon as something is recorded in it.
    """

    def git(*arguments: str) -> bytes:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, check=False)
        return done.stdout if done.returncode == 0 else b""

    try:
        diff = git("diff", "HEAD", "--no-ext-diff", "--binary", "--", ".", f":(exclude){RESULTS}")
        return git("rev-parse", "HEAD").decode().strip(), hashlib.sha256(diff).hexdigest() if diff else ""
    except FileNotFoundError:  # no git on this machine
        return "", ""
