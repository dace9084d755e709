"""How long tables, figures and report take on large stores: fills a temporary one with made-up rows, and times them.

python benchmarks/analysis.py [--cells 1000] [--measurements 100000] [--keep FOLDER]

The numbers in the store are made up by a formula and mean nothing; the store says so in its captions.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started as a script: the checkout takes the place of this folder, where a file is called like a package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sparseforge_core.store import ledger, planning, schema
from sparseforge_core.store.curves import curve_row
from sparseforge_core.store.engine import writing
from sparseforge_core.store.outcomes import mean, outcome_row
from sparseforge_core.store.rows import Curve, Outcomes, PlannedCell, PlannedSlot, PlannedSuite
from sparseforge_core.store.store import ResultStore

TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande")
ITEMS, WINDOWS = 1000, 80
SEEDS = (0, 1, 2)
METHODS = ("Magnitude", "Wanda", "SparseGPT", "SR-STE", "Frozen mask", "AST", "CAST", "Dense control", "SparseForge")
ABLATIONS = ("w/ magnitude score", "w/ Wanda score", "w/o SLoRB", "w/o distillation", "w/ half the steps", "w/o blend")
MODELS = ("GPT-2-Medium", "OPT-2.7B", "Qwen3-1.7B", "DeepSeek-MoE-16B", "LLaMA-2-7B")
BUDGETS = (160_000_000, 640_000_000, 2_500_000_000)
STEPS = 4000
CAPTION = "Made-up rows of a benchmark; no number here was measured."

ZERO_SHOT = {"kind": "zero-shot", "name": "zero-shot-7", "tasks": list(TASKS), "limit": None}
TEXT = {"kind": "perplexity", "name": "wikitext2-4096", "text": "wikitext2", "window": 4096, "limit": None}
SPEED = {"kind": "throughput", "name": "decode", "prompt_output": [[128, 128], [128, 1024]], "batch": 1, "repeats": 3}
KEYS = {"zero-shot-7": "zero-shot-7-0a1b2c", "wikitext2-4096": "wikitext2-4096-3d4e5f", "decode": "decode-6a7b8c"}


class Filler:
    """Collects rows of all tables, then writes them in one transaction."""

    def __init__(self, extra: int) -> None:
        self.extra = extra
        self.cells: dict[str, PlannedCell] = {}
        self.slots: list[PlannedSlot] = []
        self.stages: dict[str, list[str]] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {n: [] for n in ("attempt", "measurement", "outcome", "curve")}

    def row(self, exhibits: tuple[str, ...], row: str, label: str, skill: float, **about: Any) -> None:
        """A recipe with its seeds in the same row of some exhibits; `skill` moves its numbers, 0 is dense."""
        method, tokens = about.get("method", "sparseforge"), about.get("tokens", 0)
        suites = about.get("suites", ("zero-shot-7", "wikitext2-4096"))
        seeds = SEEDS if tokens else (0,)
        recipe = hashlib.sha256(f"{exhibits[0]}:{row}".encode()).hexdigest()[:12]
        for seed in seeds:
            key = f"{recipe}-s{seed}"
            spec = json.dumps({"row": row, "method": method})
            self.cells[key] = PlannedCell(
                key=key, recipe_key=recipe, seed=seed, model=row.partition("/")[0], family="made-up", pattern="2:4",
                method=method, variant=label, tokens=tokens, spec_json=spec, cell_json=spec,
            )  # fmt: skip
            self.stages[key] = ["train", *(KEYS[suite] for suite in suites)]
            self._results(key, skill, bool(tokens), method, suites, about.get("level", 0.0))
        for exhibit in exhibits:
            self.slots.append(
                PlannedSlot(
                    grid="bench", exhibit=exhibit, row=row, label=label, position=len(self.slots), recipe_key=recipe,
                    seeds=seeds, suite_keys=tuple(KEYS[suite] for suite in suites),
                )
            )  # fmt: skip

    def _results(self, key: str, skill: float, trained: bool, method: str, suites: Any, level: float) -> None:
        rng = random.Random(key)
        luck = rng.gauss(0, 0.03) if trained else 0.0
        self._stage(key, "train", {"coverage": 0.87, "soft_hard_gap": 0.0004, "final_loss": 2.1 - skill}, {})
        if trained:
            for curve in _curves(rng, skill, soft=method == "sparseforge"):
                place = {"cell_key": key, "attempt_id": len(self.rows["attempt"])}
                self.rows["curve"].append({**place, **curve_row(curve)})
        if "zero-shot-7" in suites:
            self._zero_shot(key, rng, skill + luck + level)
        if "wikitext2-4096" in suites:
            windows = [1.7 - skill * 0.6 - luck * 0.2 + math.sin(n) * 0.1 + rng.gauss(0, 0.004) for n in range(WINDOWS)]
            value = math.exp(mean(windows) or 0.0)
            self._stage(key, KEYS["wikitext2-4096"], {"perplexity": value, "nll": math.log(value)}, {"nll": windows})
        if "decode" in suites:
            speed = 75.0 if method == "dense" else 106.0
            rates = {f"decode_tokens_per_second/128x{n}": speed - n / 200 for n in (128, 1024)}
            self._stage(key, KEYS["decode"], {**rates, "weight_bytes_dense": 13e9, "weight_bytes_packed": 7.4e9}, {})

    def _zero_shot(self, key: str, rng: random.Random, ability: float) -> None:
        values, items = {}, {}
        for number, task in enumerate(TASKS):
            hard = random.Random(task)
            right = [
                float(rng.random() < 1 / (1 + math.exp(-(0.2 + number / 9 + ability + 2 * hard.gauss(0, 1)))))
                for _ in range(ITEMS)
            ]
            items[f"{task}/acc"] = right
            values[f"{task}/acc"] = mean(right) or 0.0
        values["mean/acc"] = sum(values.values()) / len(values)
        values |= {f"extra-{number}": 0.5 for number in range(self.extra)}
        self._stage(key, KEYS["zero-shot-7"], values, items)

    def _stage(self, key: str, stage: str, values: dict[str, float], items: dict[str, list[float]]) -> None:
        number = len(self.rows["attempt"]) + 1
        now = datetime.datetime(2026, 5, 6, tzinfo=datetime.UTC)
        context = {"device": "made-up GPU", "engine": "bench", "harness_version": "0.4.13"}
        texts = dict.fromkeys(("host", "device", "python", "torch", "flow_run_id", "error", "diff_sha"), "")
        self.rows["attempt"].append(
            {
                **texts, "id": number, "cell_key": key, "stage": stage, "status": "done", "started": now,
                "heartbeat": now, "finished": now, "items_sha256": None, "context": context, "git_sha": "0" * 40,
                "dirty": False, "lock_sha": "1" * 64, "command": "benchmarks/analysis.py", "pid": 1,
            }
        )  # fmt: skip
        place = {"cell_key": key, "stage": stage, "attempt_id": number}
        for metric, value in values.items():
            detail = {"split": "test"} if "/" in metric else {}
            line = {"metric": metric, "value": value, "stderr": 0.01, "n": 3, "detail": detail}
            self.rows["measurement"].append({**place, **line})
        for metric, found in items.items():
            identity = hashlib.sha256(metric.encode()).hexdigest()
            outcome = Outcomes(metric=metric, identity=identity, values=tuple(found))
            self.rows["outcome"].append({**place, **outcome_row(outcome)})

    def write(self, url: str) -> None:
        """Everything, with the results log."""
        store = ResultStore(url)
        specs = (ZERO_SHOT, TEXT, SPEED)
        suites = [PlannedSuite(key=KEYS[s["name"]], name=s["name"], spec_json=json.dumps(s)) for s in specs]
        exhibits = dict.fromkeys(slot.exhibit for slot in self.slots)
        captions = [
            PlannedSlot(grid="bench", exhibit=name, row="__caption__", label="", position=-1, note=CAPTION)
            for name in exhibits
        ]
        from flows.grids.published import PUBLISHED

        cells = list(self.cells.values())
        store.plan("bench", "Benchmark", cells, suites, [*captions, *self.slots], self.stages, published=PUBLISHED)
        with writing(store.engine) as connection:
            for name, rows in self.rows.items():
                planning.upsert(connection, schema.metadata.tables[name], rows)
            ledger.adopt(connection)
        store.close()


def _curves(rng: random.Random, skill: float, *, soft: bool) -> list[Curve]:
    steps = tuple(range(40, STEPS + 1, 40))
    done = [step / STEPS for step in steps]
    noise = [rng.gauss(0, 0.015) for _ in steps]
    bump = [0.0 if soft else 0.9 * math.exp(-x * 9) for x in done]
    loss = [2.05 - skill + 0.5 * math.exp(-5 * x) + b + e for x, b, e in zip(done, bump, noise, strict=True)]
    found = {"loss/total": loss, "loss/task": loss, "lr": [1e-4 * (1 - x) for x in done]}
    if soft:
        found["mask/mid_fraction"] = [0.85 * max(0.0, 1 - x / 0.85) ** 1.5 + 0.001 for x in done]
        found["mask/soft_hard_gap"] = [0.31 * max(0.0, 1 - x / 0.88) ** 1.3 + 0.0004 for x in done]
        found["mask/flip_rate"] = [0.02 * max(0.0, 1 - x) for x in done]
    curves = [Curve(name=name, steps=steps, values=tuple(values)) for name, values in found.items()]
    for group in ("attention", "mlp") if soft else ():
        edges = tuple(number / 20 for number in range(21))
        marks = tuple(range(0, STEPS + 1, STEPS // 5))
        counts = []
        for step in marks:
            sharp = 0.4 + 14 * (step / STEPS) ** 2
            shape = [math.exp(-sharp * 4 * (c := (n + 0.5) / 20) * (1 - c)) for n in range(20)]
            counts.append([round(1e6 * part / sum(shape)) for part in shape])
        curves.append(Curve(name=f"histogram:mask/{group}", steps=marks, values=tuple(counts), edges=edges))
    return curves


def fill(url: str, cells: int = 0, measurements: int = 0) -> Filler:
    """A store of at least so many cells and measurements; by default the smallest with every exhibit."""
    filler = Filler(max(0, math.ceil((measurements - 14 * cells) / max(cells, 1))))
    for copy in range(1_000):
        mark = f" v{copy + 1}" if copy else ""
        _one_round(filler, mark)
        if len(filler.cells) >= cells:
            break
    filler.write(url)
    return filler


def _one_round(filler: Filler, mark: str) -> None:
    filler.row(("table-2",), f"dense{mark}", f"Dense{mark}", 0.0, method="dense")
    for number, name in enumerate(METHODS):
        tokens = 0 if number < 3 else 1_250_000_000
        method = name.lower().replace(" ", "-")
        skill = -0.9 + number * 0.1
        filler.row(("table-2",), f"{method}{mark}", f"{name}{mark}", skill, method=method, tokens=tokens)
        # copies widen the tables; a figure of fifty lines is none that anybody would draw
        for budget in () if mark else BUDGETS if tokens else (0,):
            gain = 0.06 * math.log10(budget / 1e8) if budget else 0.0
            about = {"method": method, "tokens": budget}
            filler.row(("accuracy-vs-tokens",), f"{name}{mark}/{budget}", name, skill + gain, **about)
    if not mark:
        filler.row(("table-3",), "dense", "Dense", 0.0, method="dense")
        filler.row(("table-3",), "full", "SparseForge (full)", -0.1, tokens=1_250_000_000)
        for number, name in enumerate(ABLATIONS):
            filler.row(("table-3",), f"a{number}", name, -0.16 - number * 0.05, tokens=1_250_000_000)
    for number, name in enumerate(MODELS):
        for pair in (("table-1", "table-4"), ("table-5", "table-6")):
            model, level = f"{name}{mark}", number * 0.1
            filler.row(pair, f"{model}/dense", f"{model} Dense", 0.0, method="dense", level=level)
            control = {"method": "dense-control", "tokens": 1_250_000_000, "level": level}
            filler.row(pair, f"{model}/dense-control", f"{model} Dense control", 0.05, **control)
            forge = {"tokens": 1_250_000_000, "level": level}
            filler.row(pair, f"{model}/sparseforge", f"{model} SparseForge", -0.2, **forge)
    speed = ("decode",)
    filler.row(("table-7",), f"L{mark}/dense", "Dense", 0.0, method="dense", suites=speed)
    filler.row(("table-7",), f"L{mark}/sparseforge", "2:4", 0.0, suites=speed)


def main() -> int:
    """Fill, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--measurements", type=int, default=100_000)
    parser.add_argument("--keep", type=Path, help="leave the stores and what is made of them here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, measurements in (("cells", 0), ("measurements", options.measurements)):
            _time(folder, name, options.cells, measurements)
    return 0


def _time(folder: Path, name: str, cells: int, measurements: int) -> None:
    url = f"sqlite:///{folder / name}.db"
    began = time.perf_counter()
    made = fill(url, cells, measurements)
    print(
        f"{name}: {len(made.cells)} cells, {len(made.rows['measurement']):,} measurements, "
        f"{len(made.rows['outcome']):,} outcome rows; filled in {time.perf_counter() - began:.1f} s"
    )
    from analysis.make_tables import make_tables
    from analysis.report import write_report
    from sparseforge_core.store.results import Results

    for what in ("tables and figures", "the same again", "report"):
        wall, busy = time.perf_counter(), time.process_time()
        if what == "report":
            write_report(Results(url), None, folder / f"{name}.html")
        else:
            files = len(make_tables(Results(url), None, folder / name).files)
        spent = f"{time.perf_counter() - wall:.2f} s wall, {time.process_time() - busy:.2f} s of this process"
        print(f"  {what}: {spent}" + (f", {files} files" if what != "report" else ""))
    script = str(Path(__file__).resolve().parent.parent / "analysis" / "make_tables.py")
    command = [sys.executable, script, "--db", url, "--out", str(folder / f"{name}-again"), "--quiet"]
    walls = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(command, check=True)
        walls.append(time.perf_counter() - began)
    print(f"  the whole command, three times: {', '.join(f'{wall:.2f}' for wall in walls)} s wall")


if __name__ == "__main__":
    sys.exit(main())
