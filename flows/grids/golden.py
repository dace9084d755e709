"""The golden file: key and fully resolved recipe of every cell that the paper's grid plans.

    python -m flows.grids.golden        rewrites tests/golden/full.json

Fields equal to their default are not hashed, so a *changed* default would keep every key and mean something else. The
test that reads this file notices.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from flows.grids import grid_named
from flows.grids.planned import expand

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "full.json"


def golden(name: str = "full") -> dict[str, Any]:
    """Recipe key -> its cells' seeds and its resolved recipe, required cells included."""
    found: dict[str, Any] = {}
    for cell in expand(grid_named(name)).cells:
        entry = found.setdefault(cell.recipe_key, {"seeds": [], "recipe": json.loads(cell.spec_json)})
        entry["seeds"] = sorted({*entry["seeds"], cell.seed})
    return dict(sorted(found.items()))


def text_of(found: dict[str, Any]) -> str:
    """The file: one line a recipe, so that a change of one shows as one line."""
    lines = (f"{json.dumps(key)}: {json.dumps(entry, sort_keys=True)}" for key, entry in found.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    """Write the file and say what changed."""
    found = golden()
    before = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text(text_of(found))
    changed = sum(before[key] != found[key] for key in before.keys() & found.keys())
    print(
        f"{GOLDEN}: {len(found)} recipes, {len(found.keys() - before.keys())} new, "
        f"{len(before.keys() - found.keys())} gone, {changed} changed under their key"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
