"""Identity: the canonical text of a cell, its key, and the difference between two recipes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sparseforge_core import specs
from sparseforge_core.errors import RecipeError
from sparseforge_core.recipe import Cell, Recipe, Trained

_HERE = "\0recipe"
"""Where a recipe's text goes; no text of ours holds a NUL."""


def canonical(value: Any) -> str:
    """The text that is hashed: compact JSON, keys sorted, fields equal to their default left out."""
    return json.dumps(specs.encode(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(value: Any) -> str:
    """First 12 hex digits of SHA-256 over the canonical text of any spec."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:12]


def cell_key(cell: Cell) -> str:
    """`<recipe key>-s<seed>`."""
    return f"{key_of(cell.recipe)}-s{cell.seed}"


def required_cells(cell: Cell) -> tuple[Cell, ...]:
    """The cells whose checkpoints this one reads: its model and its teacher, where another cell made them."""
    sources = [cell.recipe.model, getattr(cell.recipe.objective, "teacher", None)]
    found = [source.cell(cell.seed) for source in sources if isinstance(source, Trained)]
    return tuple(dict.fromkeys(found))


def dumps(cell: Cell) -> str:
    """A cell as a file: every field written out, with its key, so that a hand edit is noticed."""
    return dumps_written(cell, key_of(cell.recipe), written(cell.recipe))


def written(recipe: Recipe) -> str:
    """The recipe's part of a cell file, the same for every seed."""
    return json.dumps(recipe_spec(recipe), indent=1, sort_keys=True, allow_nan=False)


def dumps_written(cell: Cell, recipe_key: str, recipe: str) -> str:
    """`dumps` of a cell whose recipe's key and part are known: a grid asks for the same recipe at many seeds."""
    body: dict[str, Any] = {"kind": Cell.kind, Cell.revision_key: Cell.spec_revision, "recipe": _HERE}  # type: ignore[attr-defined]
    body |= {"seed": cell.seed}
    text = json.dumps({"key": f"{recipe_key}-s{cell.seed}", "cell": body}, indent=1, sort_keys=True, allow_nan=False)
    return text.replace(json.dumps(_HERE), recipe.replace("\n", "\n  "), 1) + "\n"


def loads(text: str) -> Cell:
    """Read a cell file. Raises RecipeError if it is no JSON, names unknown parts, or its key does not match."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:  # also an endless number, or endless nesting
        raise RecipeError(f"the cell file is not JSON: {error}") from error
    if not isinstance(body, dict) or set(body) != {"key", "cell"}:
        raise RecipeError(
            "a cell file holds exactly 'key' and 'cell'; write one with `sparseforge plan GRID --out DIR`"
        )
    cell = specs.decode(body["cell"], Cell, "cell")
    if cell_key(cell) != body["key"]:
        raise RecipeError(
            f"key: the file says {body['key']}, its contents make {cell_key(cell)}. The file was edited by hand or "
            "written by other code; change the grid in flows/grids/ and plan it again"
        )
    return cell


def diff(old: Any, new: Any, path: str = "") -> list[str]:
    """Field by field differences between two JSON forms, as sentences."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(set(old) | set(new)):
            where = f"{path}.{name}" if path else name
            lines += diff(old.get(name, "(absent)"), new.get(name, "(absent)"), where)
        return lines
    return [] if old == new else [f"{path}: was {old!r}, now {new!r}"]


def recipe_spec(recipe: Recipe) -> dict[str, Any]:
    """The fully resolved recipe, every default written out, as the store keeps it."""
    spec: dict[str, Any] = specs.encode(recipe, omit_defaults=False)
    return spec
