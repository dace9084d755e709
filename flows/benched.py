"""Results of `benchmarks/decode.py`, made on a machine without a store, into the store and so into Table 7.

They become a grid of two cells, dense and 2:4, whose keys hash what was measured, where and at which commit: a file
ingested twice adds nothing, and newer results take the rows of older ones, which stay in the store.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.cycle import recorded
from flows.grids.published import PUBLISHED
from flows.provenance import provenance
from flows.stages import TRAIN
from sparseforge_core import specs
from sparseforge_core.errors import CellTaken, DataError
from sparseforge_core.evaluate.suites import ThroughputSuite, suite_key
from sparseforge_core.store.rows import Measurement, PlannedCell, PlannedSlot, PlannedSuite
from sparseforge_core.store.store import ResultStore

GRID = "decode-benchmark"
SIDES = {"dense": ("dense_", "dense", "strong dense"), "sparseforge": ("", "sparse", "2:4")}
"""Row of Table 7 -> prefix of its rates, its name in other measures, its label."""

RATE = re.compile(r"(?P<side>dense_)?decode_tokens_per_second\.(?P<prompt>\d+)_(?P<output>\d+)")

ENGINE = "static cache, one graph a step"

NAMES = {"llama-2-7b": "LLaMA-2-7B", "tiny": "LLaMA-tiny"}
"""What tables call the shapes that the benchmark fills with random weights."""

FIELDS = ("measure", "value", "unit", "bar", "hardware", "command", "commit")


def ingest_decode(store: ResultStore, path: Path) -> int:
    """Record the length pairs and weights of a results file; returns how many stages were new.

    Raises DataError for a file that is none, or holds no pair for both sides of one machine and commit.
    """
    rows = read_results(path)
    about = {name: rows["resident_memory_ratio"][name] for name in ("hardware", "command", "commit")}
    pairs = sorted({(int(m["prompt"]), int(m["output"])) for m in map(RATE.fullmatch, rows) if m})
    whole = [pair for pair in pairs if all(_rate(prefix, pair) in rows for prefix, _, _ in SIDES.values())]
    if not whole:
        raise DataError(
            f"{path} has no length pair that was measured dense and 2:4; run benchmarks/decode.py with both"
        )
    repeats = int(rows[_rate("", whole[0])].get("n", 1))
    suite = ThroughputSuite(name="decode-benchmark", prompt_output=tuple(whole), repeats=repeats)
    cells = {row: _cell(row, about) for row in SIDES}
    _plan(store, suite, cells, about)
    new = 0
    for row, (prefix, side, _) in SIDES.items():
        for stage, found in ((TRAIN, []), (suite_key(suite), _measurements(rows, whole, prefix, side))):
            new += _record(store, cells[row].key, stage, found, about)
    return new


def _record(store: ResultStore, key: str, stage: str, found: list[Measurement], about: dict[str, str]) -> int:
    """Enter one stage; 0 if it was before. Nothing was trained, which the store wants to know of every cell."""
    origin = replace(provenance(), device=about["hardware"], command=about["command"])
    try:
        attempt = store.claim(key, stage, origin)
    except CellTaken:
        return 0
    with recorded(store, attempt):
        store.finish(attempt, found, {**about, "device": about["hardware"]})
    return 1


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """A results file by measure. Raises DataError saying what is wrong with it."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["measure"]: row for row in body}
        wrong = next((row for row in body if not set(FIELDS) <= row.keys()), None)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is no results file of benchmarks/decode.py: {error}") from error
    if wrong is not None:
        raise DataError(f"{path}: {wrong['measure']} lacks {', '.join(sorted(set(FIELDS) - wrong.keys()))}")
    if "resident_memory_ratio" not in rows:
        raise DataError(f"{path} has no resident_memory_ratio; run benchmarks/decode.py with both sides")
    used = [row for name, row in rows.items() if RATE.fullmatch(name) or name.startswith("resident_bytes.")]
    used.append(rows["resident_memory_ratio"])
    if len({(row["hardware"], row["commit"]) for row in used}) > 1:
        raise DataError(f"{path} mixes rates of several machines or commits; measure all length pairs in one run")
    return rows


def _rate(prefix: str, pair: tuple[int, int]) -> str:
    return f"{prefix}decode_tokens_per_second.{pair[0]}_{pair[1]}"


def _model(command: str) -> str:
    found = re.search(r"--model[ =](\S+)", command)
    name = found.group(1) if found else "llama-2-7b"
    return NAMES.get(name, Path(name).name)


def _candidates(command: str) -> str:
    return "cuBLAS and a Triton kernel" if "--no-compile" in command else "cuBLAS, torch.compile and a Triton kernel"


def _weights(command: str) -> str:
    return "random weights" if _model(command) in NAMES.values() else "weights of the export"


def _cell(row: str, about: dict[str, str]) -> PlannedCell:
    model = _model(about["command"])
    spec = json.dumps({"kind": "decode-benchmark", "model": model, "side": row, **about}, sort_keys=True)
    key = hashlib.sha256(spec.encode()).hexdigest()[:12]
    return PlannedCell(
        key=f"{key}-s0", recipe_key=key, seed=0, model=model, family="llama", pattern="" if row == "dense" else "2:4",
        method=row, variant=_weights(about["command"]), tokens=0, spec_json=spec, cell_json=spec, pool="gpu-1",
    )  # fmt: skip


def _plan(store: ResultStore, suite: ThroughputSuite, cells: dict[str, PlannedCell], about: dict[str, str]) -> None:
    key, model = suite_key(suite), _model(about["command"])
    encoded = json.dumps(specs.encode(suite, omit_defaults=False), sort_keys=True, separators=(",", ":"))
    caption = (
        f"{model}, {_weights(about['command'])}, batch 1, both sides in one loop; the dense product is the fastest of "
        f"{_candidates(about['command'])}. Rates are of the generated tokens after the prompt. Measured by "
        f"`{about['command']}`."
    )
    slots = [PlannedSlot(grid=GRID, exhibit="table-7", row="__caption__", label="", position=-1, note=caption)]
    for position, (row, (_, _, label)) in enumerate(SIDES.items()):
        slots.append(
            PlannedSlot(
                grid=GRID,
                exhibit="table-7",
                row=f"{model}/{row}",
                label=f"{model} {label}",
                position=position,
                recipe_key=cells[row].recipe_key,
                seeds=(0,),
                suite_keys=(key,),
            )
        )
    store.plan(
        GRID,
        "Decoding, as benchmarks/decode.py measured it",
        list(cells.values()),
        [PlannedSuite(key=key, name=suite.name, spec_json=encoded)],
        slots,
        {cell.key: [TRAIN, key] for cell in cells.values()},
        published=PUBLISHED,
    )


def _measurements(
    rows: dict[str, dict[str, Any]], pairs: list[tuple[int, int]], prefix: str, side: str
) -> list[Measurement]:
    found = []
    for pair in pairs:
        row = rows[_rate(prefix, pair)]
        metric = f"decode_tokens_per_second/{pair[0]}x{pair[1]}"
        detail = {"engine": ENGINE, "batch": 1}
        found.append(
            Measurement(
                metric=metric, value=row["value"], stderr=row.get("stderr"), n=int(row.get("n", 1)), detail=detail
            )
        )
    weights = {"dense": "weight_bytes_dense", "sparse": "weight_bytes_packed"}[side]
    value = float(rows[f"resident_bytes.{side}"]["value"])
    return [*found, Measurement(metric=weights, value=value, stderr=None, n=1, detail={"dtype": "as measured"})]
