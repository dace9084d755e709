"""A store filled by hand through the real write side: rows of exhibits with chosen values, seed by seed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparseforge_core.store.rows import Curve, Outcomes, PlannedCell, PlannedSlot, PlannedSuite, PublishedNumber
from sparseforge_core.store.store import ResultStore
from tests.stores import planned_cell, record, value

TASKS = ("hellaswag", "arc_easy")
CAPTION = "__caption__"
ITEMS, WINDOWS = 100, 20


def suite(kind: str, name: str, *, key: str = "", **fields: Any) -> PlannedSuite:
    """A suite as a grid stores it."""
    return PlannedSuite(
        key=key or f"{name}-0a1b2c", name=name, spec_json=json.dumps({"kind": kind, "name": name, **fields})
    )


ZERO_SHOT = suite("zero-shot", "zero-shot-7", tasks=list(TASKS), limit=25)
TEXT = suite("perplexity", "heldout", text="heldout", window=128, limit=160)
SPEED = suite("throughput", "decode", prompt_output=[[32, 128], [32, 32]], batch=1, repeats=3)

Values = Mapping[str, Sequence[float | None]]
"""By metric, one value a seed; None diverged."""


@dataclass
class Filled:
    """Collects rows; `write` plans them as one grid and records the seeds that are done."""

    grid: str = "demo"
    recipes: str = ""
    """Begins the names of its recipes: two grids of one store then have none in common."""
    cells: dict[str, PlannedCell] = field(default_factory=dict)
    suites: dict[str, PlannedSuite] = field(default_factory=dict)
    slots: list[PlannedSlot] = field(default_factory=list)
    stages: dict[str, list[str]] = field(default_factory=dict)
    results: list[tuple[str, str, list[Any], dict[str, Any]]] = field(default_factory=list)
    curves: dict[str, list[Curve]] = field(default_factory=dict)
    """Of the train stage, by cell key."""
    with_items: bool = True
    """Whether outcomes of single items are stored that give the numbers; a store from before them has none."""

    def caption(self, exhibit: str, text: str) -> None:
        """The caption of an exhibit."""
        slot = PlannedSlot(grid=self.grid, exhibit=exhibit, row=CAPTION, label="", position=-1, note=text)
        self.slots.append(slot)

    def row(
        self,
        exhibit: str,
        row: str,
        label: str,
        measured: Mapping[str, Values],
        *,
        method: str = "sparseforge",
        tokens: int = 0,
        seeds: Sequence[int] = (0,),
        done: Sequence[int] | None = None,
        shown: Sequence[PlannedSuite] = (ZERO_SHOT, TEXT),
        context: Mapping[str, Any] | None = None,
        repeats: int = 25,
        branch: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """A recipe of its own in one row; `measured` is by suite key, values in the order of `seeds`.

        `branch` is what a side branch adds: parameters, bytes, operations per token.
        """
        for number, seed in enumerate(seeds):
            cell = planned_cell(f"{self.recipes}{exhibit}:{row}", seed, method=method, tokens=tokens)
            self.cells[cell.key] = cell
            self.stages[cell.key] = ["train", *(s.key for s in shown)]
            if done is not None and seed not in done:
                continue
            costs = zip(("extra_parameters", "extra_bytes", "extra_flops_per_token"), branch, strict=True)
            extra = [value(name, float(cost)) for name, cost in costs if any(branch)]
            self.results.append((cell.key, "train", [value("coverage", 0.75), *extra], {}))
            for key, metrics in measured.items():
                rows = [_measurement(name, values[number], repeats) for name, values in metrics.items()]
                about = {"harness_version": "0.4.13", "device": "cpu", **(context or {})}
                self.results.append((cell.key, key, rows, about))
        self.suites |= {s.key: s for s in shown}
        slot = PlannedSlot(
            grid=self.grid,
            exhibit=exhibit,
            row=row,
            label=label,
            position=len(self.slots),
            recipe_key=cell.recipe_key,
            seeds=tuple(seeds),
            suite_keys=tuple(s.key for s in shown),
        )
        self.slots.append(slot)

    def write(self, url: str, published: Sequence[PublishedNumber] = ()) -> ResultStore:
        """Everything, into the store at `url`."""
        store = ResultStore(url)
        cells, suites = list(self.cells.values()), list(self.suites.values())
        store.plan(self.grid, "By hand", cells, suites, self.slots, self.stages, published=published)
        for key, stage, measurements, context in self.results:
            items = outcomes(key, measurements) if self.with_items else []
            record(
                store,
                self.cells[key],
                stage,
                *measurements,
                outcomes=items,
                curves=self.curves.get(key, ()) if stage == "train" else (),
                **context,
            )
        return store


def outcomes(key: str, measurements: Sequence[Any]) -> list[Outcomes]:
    """Items that give the measurements: the right ones are scattered by a rule of the cell's key."""
    start = int(hashlib.sha256(key.encode()).hexdigest()[:4], 16)
    found = []
    for m in measurements:
        if m.metric == "perplexity" and m.value is not None:
            wave = [math.sin(number * 1.7 + start) / 50 for number in range(WINDOWS)]
            middle = math.fsum(wave) / WINDOWS
            values = [math.log(m.value) + part - middle for part in wave]
            found.append(Outcomes(metric="nll", identity="w" * 64, values=tuple(values)))
        elif m.metric.endswith(("/acc", "/acc_norm")) and not m.metric.startswith("mean/") and m.value is not None:
            right = round(m.value * ITEMS)
            found.append(
                Outcomes(
                    metric=m.metric,
                    identity=hashlib.sha256(m.metric.encode()).hexdigest(),
                    values=tuple(float((number * 37 + start) % ITEMS < right) for number in range(ITEMS)),
                )
            )
    return found


def _measurement(name: str, number: float | None, repeats: int) -> Any:
    if number is None:
        return value(name, None, status="diverged")
    return value(name, number, 0.5, repeats, split="validation")


def scores(
    hellaswag: Sequence[float | None], arc_easy: Sequence[float | None], ppl: Sequence[float | None]
) -> dict[str, Any]:
    """Results of both suites; the mean accuracy follows."""
    means = [None if a is None or b is None else (a + b) / 2 for a, b in zip(hellaswag, arc_easy, strict=True)]
    accuracy = {"hellaswag/acc": hellaswag, "arc_easy/acc": arc_easy, "mean/acc": means, "arc_easy/acc_norm": arc_easy}
    return {ZERO_SHOT.key: accuracy, TEXT.key: {"perplexity": ppl, "nll": [math.log(p) if p else None for p in ppl]}}


def methods(filled: Filled) -> Filled:
    """Table 2: every method done, one of the planned seeds of Wanda not yet."""
    filled.caption("table-2", "LLaMA-tiny; accuracy is near chance, 100 % & all.")
    filled.row("table-2", "dense", "Dense", scores([0.30], [0.40], [20.0]), method="dense")
    filled.row("table-2", "magnitude", "Magnitude", scores([0.25], [0.30], [412.5]), method="magnitude")
    wanda = scores([0.27, 0.26], [0.31, 0.32], [60.25, 0.0])
    filled.row("table-2", "wanda", "Wanda", wanda, method="wanda", seeds=(0, 1), done=(0,))
    forge = scores([0.28, 0.30], [0.36, 0.35], [25.5, 26.5])
    filled.row("table-2", "sparseforge", "SparseForge", forge, tokens=98_304, seeds=(0, 1))
    return filled


def models(filled: Filled) -> Filled:
    """Tables 1 and 4: two models, one of them with a dense control and a seed that diverged."""
    for exhibit in ("table-1", "table-4"):
        filled.caption(exhibit, "Two models.")
        dense, control = scores([0.30], [0.40], [20.0]), scores([0.31, 0.31], [0.41, 0.43], [18.0, 18.5])
        sparse = scores([0.28, 0.30], [0.36, 0.36], [25.5, None])
        filled.row(exhibit, "LLaMA/dense", "LLaMA Dense", dense, method="dense")
        filled.row(
            exhibit,
            "LLaMA/dense-control",
            "LLaMA Dense control",
            control,
            method="dense-control",
            tokens=98_304,
            seeds=(0, 1),
        )
        filled.row(exhibit, "LLaMA/sparseforge", "LLaMA SparseForge", sparse, tokens=98_304, seeds=(0, 1))
        filled.row(exhibit, "GPT-2/dense", "GPT-2 Dense", scores([0.2], [0.3], [30.0]), method="dense")
        filled.row(exhibit, "GPT-2/sparseforge", "GPT-2 SparseForge", {}, tokens=98_304, seeds=(0, 1), done=())
    return filled


def ablations(filled: Filled) -> Filled:
    """Table 3: differences to the full method, paired by seed."""
    filled.row("table-3", "dense", "Dense", scores([0.30], [0.40], [20.0]), method="dense")
    full = scores([0.28, 0.30], [0.36, 0.36], [25.0, 26.0])
    filled.row("table-3", "full", "SparseForge (full)", full, tokens=98_304, seeds=(0, 1))
    other = scores([0.27, 0.29], [0.35, 0.37], [27.0, 28.0])
    filled.row("table-3", "no_kd", "w/o distillation", other, tokens=98_304, seeds=(0, 1))
    return filled


def speeds(filled: Filled) -> Filled:
    """Table 7: tokens a second and bytes."""
    rate = "decode_tokens_per_second/"
    dense = {SPEED.key: {f"{rate}32x32": [100.0], f"{rate}32x128": [90.0], "weight_bytes_dense": [4.0 * 2**20]}}
    sparse = {SPEED.key: {f"{rate}32x32": [150.0], f"{rate}32x128": [99.0], "weight_bytes_packed": [2.5 * 2**20]}}
    context = {"engine": "dense kernels"}
    filled.row("table-7", "LLaMA/dense", "Dense", dense, method="dense", shown=(SPEED,), context=context, repeats=3)
    filled.row("table-7", "LLaMA/sparseforge", "2:4", sparse, shown=(SPEED,), context=context, repeats=3)
    return filled


def curve(filled: Filled) -> Filled:
    """The figure: one method across, one along three budgets."""
    figure = "accuracy-vs-tokens"
    filled.row(figure, "Wanda/0", "Wanda", scores([0.26, 0.27], [0.3, 0.3], [60.0, 62.0]), method="wanda", seeds=(0, 1))
    for tokens, ppl in ((50_000, 40.0), (100_000, 30.0), (200_000, 25.0)):
        values = scores([0.27, 0.28], [0.33, 0.34], [ppl, ppl + 1])
        filled.row(figure, f"SparseForge/{tokens}", "SparseForge", values, tokens=tokens, seeds=(0, 1))
    return filled


def everything() -> Filled:
    """A grid with something in most exhibits."""
    return curve(speeds(ablations(models(methods(Filled())))))
