"""What can be exported: a finished cell, a Hugging Face folder, or an earlier export."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseforge_core import specs
from sparseforge_core.checkpoint import BRANCHES, load_branches
from sparseforge_core.errors import ExportError
from sparseforge_core.identity import cell_key, loads, recipe_spec
from sparseforge_core.models import hub
from sparseforge_core.models.families import Family, family_of
from sparseforge_core.models.sites import assign_patterns, coverage, find_sites
from sparseforge_core.opening import cell_folder, open_apart, open_family, open_tokenizer
from sparseforge_core.recipe import Cell
from sparseforge_core.runtime.loading import load_packed
from sparseforge_core.runtime.manifest import MANIFEST, PACKED, SUMS, WEIGHTS, read_manifest
from sparseforge_core.sparsity.patterns import Pattern, PatternChoice

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
"""Copied as they are."""


@dataclass
class Exportable:
    """A model that is open for export."""

    what: str
    model: Any
    sites: dict[str, tuple[Pattern, bool]]
    """Masked weights: pattern, and whether stored `[..., in, out]`."""
    branches: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any | None = None
    copied: list[Path] = field(default_factory=list)
    """Files that come along unchanged."""


def open_any(name: str, home: Path, pattern: PatternChoice | None = None) -> Exportable:
    """Open a cell by its key, or a folder: of a cell, of an export, or one that `save_pretrained` wrote.

    `pattern` is what a plain folder is said to be; cells and exports know theirs. Raises ExportError, saying what was
    looked for, if it is none of them.
    """
    cell_file = home / "cells" / name / "cell.json"
    if Path(name).name == name and cell_file.is_file():  # a path would lead out of the home
        return open_cell(loads(cell_file.read_text(encoding="utf-8")), home)
    folder = Path(name)
    if (folder / "cell.json").is_file():
        cell = loads((folder / "cell.json").read_text(encoding="utf-8"))
        return open_cell(cell, folder.resolve().parent.parent)
    if (folder / SUMS).is_file():
        return open_export(folder)
    if (folder / MANIFEST).is_file() and folder.name == "final":
        return open_any(str(folder.resolve().parent.parent), home)
    if not (folder / "config.json").is_file():
        raise ExportError(
            f"{name} is no cell in {home / 'cells'} and no folder with a model (config.json), a cell (cell.json) or an "
            f"export ({SUMS}); `sparseforge status GRID` lists cells"
        )
    if pattern is None:
        raise ExportError(f"{name} does not say which pattern its weights have; add --pattern, for instance 2:4")
    return open_folder(folder, pattern)


def open_cell(cell: Cell, home: Path) -> Exportable:
    """A finished cell with all that was measured of it. Raises CheckpointMismatch if it is not finished."""
    model, branches = open_apart(cell, home)
    family = open_family(cell.recipe.model, model)
    about = {
        "cell": cell_key(cell),
        "source": hub.describe(cell.recipe.model),
        "seed": cell.seed,
        "recipe": recipe_spec(cell.recipe),
        "measurements": measurements(cell_folder(home, cell)),
        **_sparsity(model, family, cell.recipe.pattern),
    }
    return Exportable(
        f"cell {cell_key(cell)}",
        model,
        _sites(model, family, cell.recipe.pattern),
        branches,
        about,
        open_tokenizer(cell.recipe.model, home),
    )


def open_folder(folder: Path, pattern: PatternChoice) -> Exportable:
    """A folder that `save_pretrained` wrote, of a declared family, whose masked weights should fit `pattern`."""
    model: Any = hub.from_pretrained(dtype="auto", what=str(folder), pretrained_model_name_or_path=str(folder))
    family = family_of(model.config.model_type)
    return Exportable(
        str(folder),
        model,
        _sites(model, family, pattern),
        load_branches(folder),
        {"source": folder.name, **_sparsity(model, family, pattern)},
        copied=_tokenizer_files(folder),
    )


def open_export(folder: Path) -> Exportable:
    """An earlier export, in either format; what it says of itself is kept."""
    manifest = read_manifest(folder, skip=(WEIGHTS,))
    model: Any
    if manifest.format == PACKED:
        model, _ = load_packed(folder, dense=True, branches=False)
    else:
        model = hub.from_pretrained(dtype="auto", what=str(folder), pretrained_model_name_or_path=str(folder))
    about = dict(manifest.about)
    sites = {
        name: (specs.decode(said["pattern"], Pattern, name), bool(said["transposed"]))  # type: ignore[type-abstract]
        for name, said in about["sites"].items()
    }
    branches = load_branches(folder) if (folder / BRANCHES).is_file() else {}
    return Exportable(str(folder), model, sites, branches, about, copied=_tokenizer_files(folder))


def measurements(folder: Path) -> list[dict[str, Any]]:
    """What was measured of a cell, from the files in its folder: suite, metric, value, standard error, n."""
    rows = []
    for file in sorted(folder.glob("*/measurements.json")):
        body = json.loads(file.read_text(encoding="utf-8"))
        suite = body["suite"]["name"] if body["suite"] else body["stage"]
        dtype = body["context"].get("dtype")
        for row in body["measurements"]:
            said = {key: row[key] for key in ("metric", "value", "stderr", "n")}
            rows.append({"suite": suite, "dtype": dtype, **said})
    return rows


def _sites(model: Any, family: Family, choice: PatternChoice | None) -> dict[str, tuple[Pattern, bool]]:
    if choice is None:
        return {}
    masked = assign_patterns(find_sites(model, family), choice)
    return {site.name: (site.pattern, site.transposed) for site in masked}


def _sparsity(model: Any, family: Family, choice: PatternChoice | None) -> dict[str, Any]:
    cover = coverage(model, family, choice)
    counts = {"family": cover.family, "included": cover.included, "excluded": cover.excluded}
    return {"pattern": choice.name if choice else None, "coverage": counts if choice else None}


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
