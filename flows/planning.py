"""What a grid would cost before anything is spent: device hours, disk with its arithmetic, and when it would be over.

Sizes are upper bounds by arithmetic on the models' cards, in the words of `Disk.lines`: a finished model is written in
float32; a checkpoint holds weights, two moments and, where there is a mask, what the mask needs; of each training
cell at work there are two checkpoints and one being written; a one-shot solution that cells start from is kept once.
"""

from __future__ import annotations

import collections
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.estimates import Pace, clock, makespan
from flows.grids.planned import Plan
from flows.home import Home
from flows.placements import card_of
from sparseforge_core.data.corpora import DATA_ENV, Corpus, HubText, Synthetic, TextFiles
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.models.sources import ModelSource, Tiny
from sparseforge_core.recipe import Recipe, Trained
from sparseforge_core.store.rows import AttemptRecord, PlannedCell, StageState

FINAL_BYTES = 4
"""Of a parameter of a finished model."""
DENSE_BYTES, MASK_BYTES = 12, 13
"""Of a parameter in a checkpoint: weight and two moments; and what a mask adds to a weight that it covers, at most."""
SOLUTION_BYTES = 4
"""Of a parameter of a kept one-shot solution that moved its weights; its mask takes an eighth of a byte beside them."""
CHECKPOINTS = 3
"""Of a cell that trains: the last two good ones, and the one being written."""
DOCUMENT_TOKENS = 460
"""Tokens of a document of the web, roughly: 12 million of C4 are 5.5 billion."""
WORDS_TOKENS = 100
"""Tokens of a document of the made-up corpus."""
BYTES_A_TOKEN_OF_TEXT = 4
NARROW = ("LLaMA", "GPT", "OPT", "SmolLM2")
"""Models whose vocabulary fits two bytes; the others' token files take four a token."""
SMALL_CORPUS = 4e6
"""Tokens of a corpus that ships with the installation, at most."""


@dataclass(frozen=True)
class Disk:
    """Bytes that a grid still needs, by what for, and what there is."""

    finals: int
    checkpoints: int
    solutions: int
    tokens: int
    free: int
    folder: str
    finals_of: int
    """Cells that leave a model."""
    largest: int
    """The largest checkpoint."""
    at_work: int
    """Cells that train at once, at most."""
    files: int
    """Token files."""
    solutions_of: int
    """One-shot solutions that cells start from."""
    unknown: tuple[str, ...] = ()
    """Corpora of unknown size, which are not counted."""

    @property
    def needed(self) -> int:
        """All of it."""
        return self.finals + self.checkpoints + self.solutions + self.tokens

    @property
    def fits(self) -> bool:
        """Whether the free space is enough."""
        return self.needed <= self.free

    @property
    def lines(self) -> list[str]:
        """The arithmetic, for people."""
        lines = [
            f"disk: {size(self.needed)} needed at most, {size(self.free)} free under {self.folder}",
            f"  finished models {size(self.finals)} ({self.finals_of} cells, {FINAL_BYTES} bytes a parameter)",
            f"  checkpoints {size(self.checkpoints)} ({self.at_work} at work x {CHECKPOINTS} x {size(self.largest)}; "
            f"{DENSE_BYTES} bytes a parameter, {DENSE_BYTES + MASK_BYTES} with a mask; gone when a cell has finished)",
            f"  token files {size(self.tokens)} ({self.files} of corpus and tokenizer)",
        ]
        if self.solutions_of:
            lines.append(
                f"  one-shot solutions {size(self.solutions)} ({self.solutions_of} that cells start from; solutions/ "
                "may be deleted when nothing runs)"
            )
        lines += [f"  not counted: {name}, whose size is not known" for name in self.unknown]
        return lines

    @property
    def warning(self) -> str:
        """What is wrong, or nothing."""
        if self.fits:
            return ""
        parts = {"finished models": self.finals, "checkpoints": self.checkpoints, "token files": self.tokens}
        parts["one-shot solutions"] = self.solutions
        largest = max(parts, key=lambda name: parts[name])
        return (
            f"disk {self.folder}: {size(self.needed)} needed at most and {size(self.free)} free; most of it for "
            f"{largest} ({size(parts[largest])}). Free some space, or name another folder with --home"
        )


@dataclass(frozen=True)
class Bill:
    """What is left of a plan costs: hours by pool, time with so many workers, disk."""

    grid: str
    cells: int
    done: int
    tokens: int
    hours: dict[str, float]
    """Device hours by pool."""
    workers: int
    seconds: dict[str, float]
    """Until the pool's last cell ends, by pool."""
    known: dict[str, int]
    """How the time of the cells is known, and of how many."""
    disk: Disk
    rows: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        disk = {**self.disk.__dict__, "needed": self.disk.needed, "fits": self.disk.fits}
        eta = {"workers": self.workers, "seconds": self.seconds, "known": self.known}
        about = {name: getattr(self, name) for name in ("grid", "done", "tokens", "hours")}
        return {**about, "planned": self.cells, "eta": eta, "disk": disk, "cells": self.rows}

    def lines(self) -> list[str]:
        """The totals, for people."""
        hours = ", ".join(f"{value:,.2f} h on {pool}" for pool, value in sorted(self.hours.items())) or "nothing"
        lines = [
            f"{self.grid}: {self.cells} cells, {self.done} done, {self.tokens:,} tokens in all",
            f"cost: {hours} left (device hours)",
        ]
        if self.seconds:
            spans = ", ".join(f"{clock(seconds)} on {pool}" for pool, seconds in sorted(self.seconds.items()))
            known = ", ".join(f"{count} {how}" for how, count in sorted(self.known.items()))
            lines.append(f"time: {spans}, with {self.workers} workers of each pool (cells: {known})")
        return [*lines, *self.disk.lines]


def bill(
    plan: Plan,
    grid: str,
    home: Home,
    *,
    workers: int,
    done: frozenset[tuple[str, str]] = frozenset(),
    history: tuple[Sequence[StageState], Sequence[AttemptRecord]] = ((), ()),
    rows: list[dict[str, Any]] | None = None,
) -> Bill:
    """What is left of a plan costs. `done` are its finished stages, `history` what the store has measured of it."""
    open_cells = [c for c in plan.cells if any((c.key, stage) not in done for stage in plan.stages[c.key])]
    states = _pending(plan, done)
    pace = Pace([*(s for s in history[0] if s.status == "done"), *states], history[1])
    seconds: dict[str, float] = collections.defaultdict(float)
    known: dict[str, str] = {}
    for state in states:
        guess = pace.of(state)
        seconds[state.cell_key] += guess.seconds
        known[state.cell_key] = guess.how if known.get(state.cell_key, guess.how) == guess.how else "mixed"
    pools = {cell.key: cell.pool for cell in open_cells}
    requires = {cell.key: cell.requires for cell in open_cells}
    hours: dict[str, float] = collections.defaultdict(float)
    for cell in open_cells:
        hours[cell.pool] += cell.cost_hours
    spans = {
        pool: makespan({key: s for key, s in seconds.items() if pools[key] == pool}, requires, workers)
        for pool in sorted(set(pools.values()))
    }
    return Bill(
        grid=grid,
        cells=len(plan.cells),
        done=len(plan.cells) - len(open_cells),
        tokens=sum(cell.tokens for cell in plan.cells),
        hours={pool: round(value, 4) for pool, value in hours.items()},
        workers=workers,
        seconds={pool: round(span, 1) for pool, span in spans.items()},
        known=dict(collections.Counter(known.values())),
        disk=disk_of(plan, open_cells, done, home, workers),
        rows=rows or [],
    )


def _pending(plan: Plan, done: frozenset[tuple[str, str]]) -> list[StageState]:
    """The stages of a plan that are not done, as the store would say them."""
    found = []
    for cell in plan.cells:
        about = {name: getattr(cell, name) for name in ("requires", "pool", "cost_hours", "model", "method", "variant")}
        about |= {"seed": cell.seed, "tokens": cell.tokens}
        for stage in plan.stages[cell.key]:
            if (cell.key, stage) not in done:
                found.append(
                    StageState(cell_key=cell.key, stage=stage, status="pending", attempts=0, error="", **about)
                )
    return found


def disk_of(
    plan: Plan, cells: Iterable[PlannedCell], done: frozenset[tuple[str, str]], home: Home, workers: int
) -> Disk:
    """What cells still write: those whose training is done have written it."""
    finals, finals_of, largest, training = 0, 0, 0, 0
    wanted: dict[tuple[Any, ...], Recipe] = {}
    sizes: dict[str, tuple[Recipe, int, int]] = {}
    solutions: dict[tuple[Any, ...], int] = {}
    for cell in cells:
        if (cell.key, "train") in done:
            continue
        if cell.recipe_key not in sizes:
            recipe = plan.recipes[cell.recipe_key]
            sizes[cell.recipe_key] = recipe, final_bytes(recipe), checkpoint_bytes(recipe)
            wanted[_token_key(recipe)] = recipe
        recipe, final, checkpoint = sizes[cell.recipe_key]
        if solution := solution_bytes(recipe):
            solutions[_solution_key(recipe, cell.seed)] = solution
        finals, finals_of = finals + final, finals_of + bool(final)
        largest, training = max(largest, checkpoint), training + bool(checkpoint)
    tokens = {key: token_bytes(recipe) for key, recipe in wanted.items()}
    unknown = sorted({f"{wanted[key].corpus}" for key, size in tokens.items() if size is None})
    at_work = min(workers, training)
    folder = next(path for path in (home.root, *home.root.parents) if path.exists())
    return Disk(
        finals=finals,
        checkpoints=CHECKPOINTS * largest * at_work,
        solutions=sum(solutions.values()),
        tokens=sum(size for size in tokens.values() if size is not None),
        free=shutil.disk_usage(folder).free,
        folder=str(folder),
        finals_of=finals_of,
        largest=largest,
        at_work=at_work,
        files=len(tokens) - len(unknown),
        solutions_of=len(solutions),
        unknown=tuple(unknown),
    )


def final_bytes(recipe: Recipe) -> int:
    """Of the model that a cell leaves; a cell that changes nothing leaves none."""
    if not (recipe.method.sparsifies or recipe.method.trains):
        return 0
    return int(FINAL_BYTES * card_of(recipe.model).parameters)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Of one checkpoint, with every parameter under the mask; a cell without steps writes none."""
    if not recipe.train.steps:
        return 0
    each = DENSE_BYTES + (MASK_BYTES if recipe.method.sparsifies else 0)
    return int(each * card_of(recipe.model).parameters)


def solution_bytes(recipe: Recipe) -> int:
    """Of the one-shot solution that a cell starts from, which is kept for others; every parameter under the mask."""
    begun = recipe.method.begins_from()
    if begun is None or not begun.calibrates():
        return 0
    return int(((SOLUTION_BYTES if begun.moves_weights() else 0) + 1 / 8) * card_of(recipe.model).parameters)


def token_bytes(recipe: Recipe) -> int | None:
    """Of the token file that a recipe reads; None where nobody knows how large its corpus is."""
    count = corpus_tokens(recipe.corpus)
    if count is None:
        return None
    narrow = isinstance(_made_by(recipe.model), Tiny) or card_of(recipe.model).name.startswith(NARROW)
    return int(count * (2 if narrow else 4))


def corpus_tokens(corpus: Corpus) -> float | None:
    """Roughly how many tokens a corpus has; None for a data set of the hub without a limit."""
    if isinstance(corpus, HubText):
        return None if corpus.documents_limit is None else float(corpus.documents_limit * DOCUMENT_TOKENS)
    if isinstance(corpus, Synthetic):
        return float(corpus.documents_count * WORDS_TOKENS)
    if isinstance(corpus, TextFiles):
        found = [Path(os.environ.get(DATA_ENV, "")) / path for path in corpus.paths]
        if not all(path.is_file() for path in found):
            return None
        return sum(path.stat().st_size for path in found) / BYTES_A_TOKEN_OF_TEXT
    return SMALL_CORPUS


def _made_by(source: ModelSource) -> ModelSource:
    """The source at the bottom of a chain of cells."""
    while isinstance(source, Trained):
        source = source.recipe.model
    return source


def _token_key(recipe: Recipe) -> tuple[Any, ...]:
    """What decides which token file a recipe reads: its corpus, and its tokenizer as far as names tell it."""
    source = _made_by(recipe.model)
    tokenizer = source.tokenizer if isinstance(source, Tiny) else card_of(source).name.partition("-")[0]
    return recipe.corpus, tokenizer


def _solution_key(recipe: Recipe, seed: int) -> tuple[Any, ...]:
    """What decides which solution a cell starts from."""
    return recipe.model, recipe.method.begins_from(), recipe.pattern, recipe.corpus, seed


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def history_of(home: Home, grid: str) -> tuple[Sequence[StageState], Sequence[AttemptRecord]]:
    """What the store has measured of a grid; nothing where there is no store, or it has never planned the grid."""
    from sparseforge_core.store.results import Results

    try:
        results = Results(home.store_url)
    except SparseForgeError:  # planning needs no store
        return (), ()
    try:
        return results.progress(grid) if grid in results.grids() else ((), ())
    finally:
        results.close()
