"""The long fault test: seeded, bounded, and at the end one line of JSON with what was done and what was lost.

python -m tests.soak [--seed N] [--only PART ...] [--short] [--out FILE]

Exit code 0 if nothing was lost, recorded twice or answered by a traceback, and every bar was reached; else 1. What went
wrong stands on standard error as it happens.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.home import be_quiet
from tests.conftest import QUIET

os.environ.update(QUIET)
be_quiet()

ROOT = Path(__file__).resolve().parents[2]

BARS = {"kills": 1000, "corruptions": 200, "racing claims": 16_000, "mutated configs": 10_000, "resumes checked": 30}
"""What a whole run must at least do."""
ZERO = ("lost results", "double commits", "tracebacks")


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    forked: int = 1000
    trees: int = 12
    corruptions: int = 208
    racers: int = 16
    cells: int = 1000
    configs: int = 10_000
    paused: int = 12
    full: int = 16
    locked: int = 6
    gone: int = 4
    away: int = 16
    refused: int = 12
    pairs: int = 8


SHORT = Size(
    forked=12, trees=1, corruptions=6, cells=30, configs=300, paused=1, full=3, locked=1, gone=1, away=2, refused=1,
    pairs=2,
)  # fmt: skip
"""A little of everything: what the ordinary tests run of it, and to see whether the soak itself works."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="parts: " + ", ".join(PARTS))
    parser.add_argument("--short", action="store_true", help="little of everything, and no bars")
    parser.add_argument(
        "--out", type=Path, help="also write the measures to this file, such as benchmarks/results/soak.json"
    )
    options = parser.parse_args(arguments)
    began, commit = time.monotonic(), _commit()
    if options.only:
        line = alone(options.seed, SHORT if options.short else Size(), options.only)
    else:
        line = side_by_side(options.seed, short=options.short)
    line["seconds"] = round(time.monotonic() - began)
    line["commit"] = commit
    whole = not (options.short or options.only)
    missed = [name for name, bar in BARS.items() if _total(line[name]) < bar] if whole else []
    if missed:
        print(f"too little: {', '.join(missed)}", file=sys.stderr)
    if options.out:
        options.out.write_text(json.dumps(measures(line), indent=1) + "\n")
    print(json.dumps(line))
    return 1 if missed or any(line[name] for name in ZERO) else 0


def alone(seed: int, size: Size, parts: list[str]) -> dict[str, Any]:
    """Run parts in this process; the line of counts."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    scratch = Path(tempfile.mkdtemp(prefix="sf-soak-"))
    try:
        return soak(scratch, seed, size, parts)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def side_by_side(seed: int, *, short: bool) -> dict[str, Any]:
    """Run all parts in a process for each lane; the sums of their counts. Raises AssertionError if one ends early."""
    lanes = []
    for parts in LANES:
        command = [sys.executable, "-m", "tests.soak", "--seed", str(seed), "--only", *parts]
        command += ["--short"] if short else []
        lanes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    line: dict[str, Any] = {}
    for lane in lanes:
        said, _ = lane.communicate()
        if not said.strip():
            raise AssertionError(f"{lane.args} ended with {lane.returncode} and without a line of counts")
        for name, value in json.loads(said.splitlines()[-1]).items():
            line[name] = _sum(line.get(name), value)
    return {**line, "seed": seed}  # the lanes' own seconds and commits are replaced by the caller


def _sum(one: Any, other: Any) -> Any:
    if one is None:
        return other
    if isinstance(one, dict):
        return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
    return one + other


def soak(scratch: Path, seed: int, size: Size, parts: list[str]) -> dict[str, Any]:
    """Run the parts; the line of counts."""
    from tests.soak.grid import register
    from tests.soak.world import Counts, undisturbed

    register()
    counts, costs = Counts(), dict[str, float]()
    reference = undisturbed(scratch)
    for name in parts:
        began = time.monotonic()
        folder = scratch / name
        folder.mkdir()
        costs |= PARTS[name](reference, folder, random.Random(f"{seed} {name}"), size, counts) or {}
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return {
        "kills": counts.kills,
        "corruptions": counts.corruptions,
        "racing claims": counts.racing,
        "mutated configs": counts.mutated_configs,
        "resumes checked": counts.resumes_checked,
        "other faults": counts.faults,
        "worlds compared": counts.worlds_compared,
        **{name: round(value, 4) for name, value in costs.items()},
        "lost results": counts.lost_results,
        "double commits": counts.double_commits,
        "tracebacks": counts.tracebacks,
        "seed": seed,
    }


def _total(value: Any) -> int:
    return sum(value.values()) if isinstance(value, dict) else int(value)


# -------------------------------------------------------------------------------------------------------------- parts
# Everything that forks comes before what starts threads.


def _kills(reference: Any, scratch: Path, chance: random.Random, size: Size, counts: Any) -> None:
    from tests.soak.kills import forked_kills

    forked_kills(reference, scratch, chance, size.forked, counts)


def _corruptions(reference: Any, scratch: Path, chance: random.Random, size: Size, counts: Any) -> None:
    from tests.soak.corruptions import corrupt

    corrupt(reference, scratch, chance, size.corruptions, counts)


def _claims(reference: Any, scratch: Path, chance: random.Random, size: Size, counts: Any) -> None:
    from tests import postgres
    from tests.soak.claims import race

    race(f"sqlite:///{scratch / 'race.db'}", scratch, size.racers, size.cells, counts)
    with postgres.server() as admin, postgres.database(admin) as url:
        race(url, scratch, size.racers, size.cells, counts)


def _configs(reference: Any, scratch: Path, chance: random.Random, size: Size, counts: Any) -> None:
    from tests.soak.configs import mutated

    mutated(scratch, chance, size.configs, counts)


def _resumes(reference: Any, scratch: Path, chance: random.Random, size: Size, counts: Any) -> None:
    from tests.soak.resumes import resumes

    resumes(reference, scratch, chance, counts, short=size is SHORT)


def _faults(reference: Any, scratch: Path, chance: random.Random, size: Size, counts: Any) -> None:
    from tests.soak import away, faults

    start = faults.begun(scratch)
    faults.paused(start, reference, scratch, chance, size.paused, counts)
    faults.full_disk(start, reference, scratch, size.full, counts)
    faults.locked(start, reference, scratch, chance, size.locked, counts)
    if not faults.read_only(start, reference, scratch, counts):
        print("read-only file system: not tested, mounting is not permitted", file=sys.stderr)
    away.gone_and_back(reference, scratch, chance, size.away, counts)
    away.refused(start, reference, scratch, chance, size.refused, counts)
    faults.gone_and_back(reference, scratch, chance, size.gone, counts)


def _trees(reference: Any, scratch: Path, chance: random.Random, size: Size, counts: Any) -> None:
    from tests.soak.kills import tree_kills
    from tests.soak.servers import prepared_mlflow
    from tests.soak.world import World

    database = prepared_mlflow(scratch)

    def made(root: Path) -> World:
        root.mkdir(parents=True)
        shutil.copy(database, root / "mlflow.db")
        return World(root)

    tree_kills(reference, scratch, chance, size.trees, counts, made)


def _servers(reference: Any, scratch: Path, chance: random.Random, size: Size, counts: Any) -> dict[str, float]:
    from tests.soak.servers import cost_of_losing_mlflow, mlflow_killed, prefect_killed

    mlflow_killed(reference, scratch, chance, counts)
    prefect_killed(reference, scratch, chance, counts)
    return cost_of_losing_mlflow(reference, scratch, size.pairs)


PARTS: dict[str, Callable[..., dict[str, float] | None]] = {
    "kills": _kills,
    "corruptions": _corruptions,
    "claims": _claims,
    "configs": _configs,
    "resumes": _resumes,
    "faults": _faults,
    "trees": _trees,
    "servers": _servers,
}


LANES = (("kills", "trees"), ("corruptions", "claims", "configs", "resumes", "faults", "servers"))
"""Two processes side by side, of about the same length."""


# ------------------------------------------------------------------------------------------------------------ results


def measures(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The counts as this project keeps measured figures."""
    import torch

    cores = len(os.sched_getaffinity(0))
    about = {
        "hardware": f"{cores} CPU cores ({platform.machine()}), torch {torch.__version__}",
        "command": "make soak",
        "commit": line["commit"],
    }
    bars: dict[str, float] = {**BARS, **dict.fromkeys(ZERO, 0), "trainer_seconds_mlflow_lost_over_without": 1.01}
    found = []
    for name, value in line.items():
        if name in ("seed", "commit"):
            continue
        unit = "s" if name == "seconds" else "ratio" if isinstance(value, float) else "count"
        amount = value if isinstance(value, float) else _total(value)
        detail = {"detail": value} if isinstance(value, dict) else {}
        measure = f"soak.{name.replace(' ', '_')}"
        found.append({"measure": measure, "value": amount, "unit": unit, "bar": bars.get(name), **about, **detail})
    return found


def _commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
