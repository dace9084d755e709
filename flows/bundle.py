"""Carrying cells to a machine without a store: `write_bundle` makes the folder that runs there.

`python -m sparseforge_core.run bundle FOLDER` executes it with torch and transformers alone; `flows/ingesting.py`
brings the results home.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.bundle_data import copy_corpora, copy_measured, copy_tokenizers, is_carried
from flows.grids import GRIDS, grid_named
from flows.grids.planned import Plan, expand
from flows.home import Home
from flows.provenance import ROOT, provenance
from flows.stages import TRAIN
from sparseforge_core import bundles, files, specs
from sparseforge_core.data.corpora import Corpus, HubText, TextFiles
from sparseforge_core.errors import BundleError, RecipeError, unknown
from sparseforge_core.evaluate.suites import WIKITEXT_ENV, Suite
from sparseforge_core.identity import loads, required_cells
from sparseforge_core.models.sources import Hub, Local, Packaged, TokenizerDir
from sparseforge_core.recipe import Cell
from sparseforge_core.store.rows import PlannedCell

SLURM = ROOT / "infra" / "slurm"
"""The template of the job array."""

MILLION = 1_000_000
LEAST = 4
"""Characters of a cell's key that must be given."""


@dataclass
class Chosen:
    """The cells of a bundle, and all that they need."""

    cells: dict[str, PlannedCell] = field(default_factory=dict)
    """By key, each after the cells whose model it reads."""
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The suites of each cell by their keys, as JSON."""
    grids: dict[str, None] = field(default_factory=dict)

    def add(self, plan: Plan, grid: str, keys: Iterable[str]) -> None:
        """Add cells of a plan with what they require, and every suite that the plan wants of them."""
        planned = {cell.key: cell for cell in plan.cells}
        suites = {suite.key: json.loads(suite.spec_json) for suite in plan.suites}

        def one(key: str) -> None:
            for required in planned[key].requires:
                one(required)
            self.cells.setdefault(key, planned[key])
            wanted = {name: suites[name] for name in plan.stages[key] if name != TRAIN}
            self.suites.setdefault(key, {}).update(wanted)
            self.grids[grid] = None

        for key in keys:
            one(key)

    def levels(self) -> dict[str, int]:
        """How many cells must be finished, one after the other, before each."""
        found: dict[str, int] = {}
        for key, cell in self.cells.items():
            found[key] = max((found[required] + 1 for required in cell.requires), default=0)
        return found


@dataclass(frozen=True, kw_only=True)
class Only:
    """Which cells of a grid are wanted; what is empty takes all. What they need comes along in any case."""

    pool: str | None = None
    variants: tuple[str, ...] = ()
    """As a listing shows them, in capitals or not."""
    seeds: tuple[int, ...] = ()
    millions: tuple[int, ...] = ()
    """Retraining tokens, in whole millions: 12 for 12,009,472."""
    without: frozenset[str] = frozenset()
    """Keys of cells to leave out."""

    def of(self, plan: Plan, grid: str) -> list[str]:
        """Keys of the cells of a plan. Raises RecipeError for a wish that no cell fulfils."""
        folded = {name.casefold() for name in self.variants}
        asked: tuple[tuple[str, Iterable[Any], set[Any]], ...] = (
            ("variant", self.variants, {cell.variant for cell in plan.cells}),
            ("seed", self.seeds, {cell.seed for cell in plan.cells}),
            ("millions of tokens", self.millions, {cell.tokens // MILLION for cell in plan.cells}),
        )
        for what, wanted, known in asked:
            texts = {str(one).casefold() for one in known}
            for one in wanted:
                if str(one).casefold() not in texts:
                    raise RecipeError(f"grid {grid}: " + unknown(what, str(one), map(str, known)))
        return [
            cell.key
            for cell in plan.cells
            if self.pool in (None, cell.pool)
            and (not folded or cell.variant.casefold() in folded)
            and (not self.seeds or cell.seed in self.seeds)
            and (not self.millions or cell.tokens // MILLION in self.millions)
            and cell.key not in self.without
        ]


ALL = Only()


def settled(home: Home) -> frozenset[str]:
    """The cells with nothing left to do elsewhere. Raises StoreError if there is no store.

    All of their stages are recorded, or their training is and made a model: another training would make another model,
    and what is measured of that one says nothing of the recorded one.
    """
    from sparseforge_core.store.results import Results

    results = Results(home.store_url)
    try:
        statuses = results.stage_statuses()
        trained = {cell for (cell, stage), status in statuses.items() if (stage, status) == (TRAIN, "done")}
        open_ = {cell for (cell, _), status in statuses.items() if status != "done"}
        bodies = results.cell_bodies(sorted(trained & open_))
    finally:
        results.close()
    untouched = {key for key, body in bodies.items() if _is_untouched(specs.decode(body, Cell, "cell"))}
    return frozenset(trained - (open_ & untouched))


def _is_untouched(cell: Cell) -> bool:
    """Whether the model of a cell is a source's as it is, and so the same wherever it is opened."""
    method = cell.recipe.method
    return not (method.sparsifies or method.trains or required_cells(cell))


def choose(names: Sequence[str], *, grid: str | None = None, only: Only = ALL) -> Chosen:
    """The cells that are named: by a grid, or by the beginning of a key in `grid` (default: the first that has it).

    `only` chooses among the cells of grids that are named as a whole. Raises RecipeError for a name that is neither,
    that begins several keys, or of which nothing is left.
    """
    chosen, plans = Chosen(), dict[str, Plan]()

    def plan_of(name: str) -> Plan:
        if name not in plans:
            plans[name] = expand(grid_named(name))
        return plans[name]

    for name in names:
        if name in GRIDS:
            keys = only.of(plan_of(name), name)
            if not keys:
                raise RecipeError(f"grid {name} has no cell with all that was asked for: {only}")
            chosen.add(plan_of(name), name, keys)
            continue
        for candidate in (grid,) if grid else GRIDS:
            keys = [c.key for c in plan_of(candidate).cells if len(name) >= LEAST and c.key.startswith(name)]
            if len(keys) > 1:
                raise RecipeError(f"{name!r} begins {len(keys)} cells of grid {candidate}: {', '.join(keys[:4])}")
            if keys:
                chosen.add(plan_of(candidate), candidate, keys)
                break
        else:
            where = f"grid {grid} has no cell" if grid else "no grid has a cell"
            raise RecipeError(
                f"{where} whose key begins with {name!r} (at least {LEAST} characters), and it is no grid: "
                f"{unknown('grid', name, GRIDS)} `sparseforge plan GRID` lists keys"
            )
    return chosen


def write_bundle(chosen: Chosen, folder: Path, *, there: bool = False, slurm: bool = False) -> int:
    """Write a bundle of these cells; returns how many. Files of earlier ones are replaced, a `home` in it stays.

    `there` says that what a bundle cannot carry is on the other machine; without it that is a BundleError by name.
    """
    cells = {key: loads(cell.cell_json) for key, cell in chosen.cells.items()}
    suites = [specs.decode(data, Suite, "suite") for of in chosen.suites.values() for data in of.values()]
    whole: list[Cell | Suite] = [*cells.values(), *suites]
    absent = _not_carried(whole)
    if absent and not there:
        raise BundleError(
            f"a bundle cannot carry {'; '.join(absent)}. If the other machine has all of it under the same names, say "
            "so with --there"
        )
    levels = chosen.levels()
    ordered = sorted(cells, key=lambda key: levels[key])
    corpora = _corpora(whole)
    _copy_code(folder)
    copy_corpora(folder, corpora)
    copy_tokenizers(folder, {part for one in whole for part in _inside(one) if isinstance(part, TokenizerDir)})
    copy_measured(folder, suites)
    entries = [
        {
            "cell": json.loads(chosen.cells[key].cell_json),
            "suites": list(chosen.suites[key].values()),
            "level": levels[key],
        }
        for key in ordered
    ]
    texts = [{"corpus": specs.encode(corpus), "identity": corpus.identity()} for corpus in corpora]
    origin = provenance()
    about = {"code": origin.git_sha, "changes": origin.diff_sha, "grids": list(chosen.grids), "there": absent}
    bundles.write_description(folder, entries, texts, about)
    if slurm:
        _write_slurm(folder, [levels[key] for key in ordered])
    return len(entries)


def _inside(value: Any) -> Iterator[Any]:
    """A spec and every spec in it."""
    if dataclasses.is_dataclass(value):
        yield value
        for part in dataclasses.fields(value):
            yield from _inside(getattr(value, part.name))
    elif isinstance(value, tuple):
        for one in value:
            yield from _inside(one)


def _corpora(whole: Iterable[Cell | Suite]) -> list[Corpus]:
    found = {specs_key(part): part for one in whole for part in _inside(one) if isinstance(part, Corpus)}
    return [corpus for _, corpus in sorted(found.items())]


def specs_key(part: Any) -> str:
    """One text for one spec."""
    return json.dumps(specs.encode(part), sort_keys=True)


def _not_carried(whole: Iterable[Cell | Suite]) -> list[str]:
    """What stays here, by name: models and tokenizers that are files or packages, texts of the hub, stock tasks."""
    found: dict[str, None] = {}
    for one in whole:
        for part in _inside(one):
            match part:
                case Hub():
                    found[f"the model {part.id} of the hub"] = None
                case Packaged():
                    found[f"the packaged model {part.name}"] = None
                case Local():
                    found[f"the model in the folder {part.path}"] = None
                case TokenizerDir() if not is_carried(part.path):
                    found[f"the tokenizer in the folder {part.path}"] = None
                case HubText():
                    found[f"the corpus {part.id} of the hub"] = None
                case TextFiles():
                    for path in part.paths:
                        if not is_carried(path):
                            found[f"the corpus file {path}, which lies outside of the data folder"] = None
                case Suite():
                    if tasks := getattr(part, "tasks", ()):
                        found[f"lm-eval with the tasks of suite {part.name} ({', '.join(tasks)})"] = None
                    carried = ("heldout", "named", *(("wikitext2",) if os.environ.get(WIKITEXT_ENV) else ()))
                    if (text := getattr(part, "text", "heldout")) not in carried:
                        found[f"the text {text} of suite {part.name}"] = None
    return list(found)


def _copy_code(folder: Path) -> None:
    """The package that runs there, without what has been compiled."""
    with files.new_folder(folder / bundles.CODE) as temporary:
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / "sparseforge_core", temporary / "sparseforge_core", ignore=ignore)


def _write_slurm(folder: Path, levels: list[int]) -> None:
    """The array script, and the one that submits it level after level."""
    shutil.copyfile(SLURM / "array.sh", folder / "array.sh")
    lines = []
    for level in range(max(levels, default=-1) + 1):
        first, last = levels.index(level), len(levels) - 1 - levels[::-1].index(level)
        after = ' --dependency="afterok:$job"' if level else ""
        lines.append(f'job=$(sbatch --parsable --array={first}-{last}{after} "$@" array.sh)')
        lines.append(f'echo "cells {first} to {last}: job $job"')
    template = (SLURM / "submit.sh").read_text(encoding="utf-8")
    files.write_text(folder / "submit.sh", template + "\n".join(lines) + "\n")
    for name in ("array.sh", "submit.sh"):
        (folder / name).chmod(0o755)
