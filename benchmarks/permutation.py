"""What an order of channels is worth before any retraining: SparseGPT's one-shot 2:4 model with and without it.

    SPARSEFORGE_DATA=DATA python benchmarks/permutation.py --samples 32 --length 512 --limit 8

SmolLM2-135M, calibrated on the study's text, judged by texts that no table shows. Prints the perplexities, the share
of all scores that groups lose in the order as it is and in the one that was found, and the seconds of each cell's
pruning, of which the search is what the second takes longer.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # measures the checkout that it lies in

from flows.grids.study import MIXED, MODEL
from flows.grids.study_lab import ELSEWHERE, FORGOTTEN
from sparseforge_core.methods import Method, SparseGPT
from sparseforge_core.opening import cell_folder
from sparseforge_core.recipe import Cell, Recipe
from sparseforge_core.run import evaluate_cell, train_cell
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.sparsity.permutation import ChannelPermutation


def measured(method: Method, permutation: ChannelPermutation | None, home: Path, limit: int) -> dict[str, Any]:
    """One cell, pruned and measured."""
    recipe = Recipe(model=MODEL, method=method, corpus=MIXED, pattern=nm(2, 4), permutation=permutation)
    cell = Cell(recipe=recipe)
    folder = cell_folder(home, cell)
    context = json.loads(train_cell(cell, folder / "train", home).read_text())["context"]
    found: dict[str, Any] = {"method": method.kind, "seconds": context["wall_seconds"]}
    if "permutation" in context:
        found |= {name: value for name, value in context["permutation"].items() if name != "key"}
    for suite in (ELSEWHERE, FORGOTTEN):
        some = replace(suite, limit=limit)
        body = json.loads(evaluate_cell(cell, some, folder / suite.name, home).read_text())
        (nll,) = (row["value"] for row in body["measurements"] if row["metric"] == "nll")
        found[suite.name] = math.exp(nll)
    return found


def main() -> None:
    """Measure all and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of both")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--limit", type=int, default=256, help="windows of 1,024 tokens of each text")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    some = {"samples": options.samples, "length": options.length}
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for permutation in (None, ChannelPermutation(**some)):
            rows.append(measured(SparseGPT(**some), permutation, Path(home), options.limit))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(", ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
