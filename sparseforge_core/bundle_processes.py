"""Several processes at one bundle, started by one command: so many for each GPU that is visible, or in all without one.

They share the bundle as any processes do (`bundle_run`): each takes the first cell that nobody holds. What each says is
in a log of its own, beside the cells.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from sparseforge_core.errors import CellsFailed, Interrupted, RecipeError

log = logging.getLogger(__name__)

LOGS = "logs"
"""Folder of the bundle's home with what each process said."""
POLL = 0.2
"""Seconds between two looks at the processes."""
STOPPED = 130
"""Exit code of one that was stopped and left a checkpoint."""


def places(each: int, *, gpus: int, cores: int, environment: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What each process has in its environment beside ours, by its name: its GPU, and its share of the cores.

    `each` is how many for a GPU, or in all where there is none; `gpus` is how many CUDA sees. What our environment says
    of GPUs and threads is kept to. Raises RecipeError for less than one process.
    """
    if each < 1:
        raise RecipeError(f"--processes {each}: at least 1")
    named = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    seen = named[:gpus] if named else [str(index) for index in range(gpus)]
    found = {
        f"gpu-{gpu.replace('/', '-')}-{number}": {"CUDA_VISIBLE_DEVICES": gpu}
        for number in range(1, each + 1)
        for gpu in seen
    } or {f"cpu-{number}": {} for number in range(1, each + 1)}
    if "OMP_NUM_THREADS" not in environment:
        threads = max(1, cores // len(found))
        found = {name: {**own, "OMP_NUM_THREADS": str(threads)} for name, own in found.items()}
    return found


def run_together(
    arguments: Sequence[str], each: int, logs: Path, should_stop: Callable[[], bool], *, gpus: int = 0
) -> None:
    """Run `python -m sparseforge_core.run ARGUMENTS` as often as `places` says, and wait for all.

    Raises RecipeError for less than one process, CellsFailed if any ended in an error, and Interrupted when asked to
    stop: each is then stopped as one alone would be, with a checkpoint.
    """
    environments = places(each, gpus=gpus, cores=len(os.sched_getaffinity(0)), environment=os.environ)
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "sparseforge_core.run", *arguments]
    running: dict[str, subprocess.Popen[bytes]] = {}
    codes: dict[str, int] = {}
    asked = False
    try:
        for name, own in environments.items():
            with _log(logs, name).open("ab") as out:
                running[name] = subprocess.Popen(command, env={**os.environ, **own}, stdout=out, stderr=out)
            log.info("%s: process %d, %s", name, running[name].pid, _log(logs, name))
        while running:
            if should_stop() and not asked:
                asked = True
                _stop(running.values())
            for name, process in list(running.items()):
                if (code := process.poll()) is not None:
                    codes[name] = code
                    del running[name]
                    log.info("%s: ended with %d; %d still at work", name, code, len(running))
            time.sleep(POLL)
    finally:
        _stop(running.values())
        for process in running.values():
            process.wait()
    # One that has not begun to listen yet is ended by the signal itself: it held nothing.
    stopped = (STOPPED, -signal.SIGTERM) if asked else (STOPPED,)
    failed = {name: code for name, code in codes.items() if code not in (0, *stopped)}
    if failed:
        said = dict.fromkeys(_last_words(_log(logs, name), code) for name, code in failed.items())
        raise CellsFailed(f"{len(failed)} of {len(codes)} processes failed: {'; '.join(said)}. {logs}/ has their logs")
    if set(stopped) & set(codes.values()):
        raise Interrupted("stopped, with checkpoints; run the same command again to go on from here")


def _log(logs: Path, name: str) -> Path:
    return logs / f"{name}.log"


def _stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()


def _last_words(path: Path, code: int) -> str:
    """The last line of a log; of a process that a signal ended, which: it had no time to say so."""
    if code < 0:
        return f"{path.stem} was ended by signal {-code}"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), f"{path.stem} ended with {code} and said nothing")
