"""Whether masks and curvature kept in few bytes cost quality: one tiny model, annealed both ways, seed by seed.

python benchmarks/lean_storage.py [--seeds 3] [--steps 300] [--pretrain 1000] [--home DIR] [--json]

A tiny LLaMA is pretrained on the demo's text and annealed to 2:4 by the method's defaults and by its lean form (m and
hard mask in 16 bits, average of squared gradients in bfloat16, a layer's statistics from every 16th row). Printed: the
held-out perplexity of each, and of the finished masks the share on which both agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import load_file

from benchmarks.train import DEFAULT, LEAN
from sparseforge_core.data.corpora import PythonDocs
from sparseforge_core.evaluate.suites import HELDOUT
from sparseforge_core.methods import DenseControl, SparseForge
from sparseforge_core.models.sources import Tiny, TrainedBPE
from sparseforge_core.objective import Distill
from sparseforge_core.opening import cell_folder
from sparseforge_core.recipe import Cell, Recipe, Trained, TrainPlan
from sparseforge_core.run import evaluate_cell, train_cell
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.sparsity.patterns import nm

CORPUS = PythonDocs()
TEXT = dataclasses.replace(HELDOUT, window=128, limit=160)


def pretraining(steps: int) -> Recipe:
    """The dense model that all start from."""
    plan = TrainPlan(steps=steps, sequences=8, length=128, lr=WarmupLinear(peak=4e-3))
    source = Tiny(architecture="llama", tokenizer=TrainedBPE(corpus=CORPUS, size=2048))
    return Recipe(model=source, method=DenseControl(), corpus=CORPUS, train=plan)


def annealing(method: SparseForge, dense: Recipe, steps: int) -> Recipe:
    """One way from there to 2:4."""
    plan = TrainPlan(steps=steps, sequences=8, length=128, lr=WarmupLinear(peak=2e-3))
    return Recipe(
        model=Trained(recipe=dense, seed=0),
        method=dataclasses.replace(method, update_every=1),
        corpus=CORPUS,
        pattern=nm(2, 4),
        objective=Distill(),
        train=plan,
    )


def perplexity(cell: Cell, home: Path) -> float:
    """Train the cell, if it is not yet, and measure it."""
    folder = cell_folder(home, cell)
    train_cell(cell, folder / "train", home)
    body = json.loads(evaluate_cell(cell, TEXT, folder / "text", home, ngram=None).read_text())
    found = {row["metric"]: row["value"] for row in body["measurements"]}
    return float(next(value for name, value in found.items() if "perplexity" in name or name == "ppl"))


def agreement(cells: list[Cell], home: Path) -> float:
    """Share of the masked weights that both finished models keep or both prune."""
    one, other = (load_file(cell_folder(home, cell) / "train" / "final" / "model.safetensors") for cell in cells)
    same = total = 0
    for name, weight in one.items():
        if weight.ndim == 2 and 0.4 < float((weight == 0).float().mean()) < 0.6:
            same += int(((weight == 0) == (other[name] == 0)).sum())
            total += weight.numel()
    return same / total


def measure(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Both ways at every seed."""
    dense = pretraining(options.pretrain)
    base = perplexity(Cell(recipe=dense), home)
    rows = []
    for seed in range(options.seeds):
        cells = [Cell(recipe=annealing(method, dense, options.steps), seed=seed) for method in (DEFAULT, LEAN)]
        default, lean = (perplexity(cell, home) for cell in cells)
        rows.append({"seed": seed, "default": default, "lean": lean, "same_mask": agreement(cells, home)})
        print(rows[-1], flush=True)
    ratios = [row["lean"] / row["default"] for row in rows]
    return {"dense": base, "rows": rows, "lean_over_default": statistics.mean(ratios), "ratios": ratios}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the annealing")
    parser.add_argument("--steps", type=int, default=300, help="annealing steps, of 1,024 tokens")
    parser.add_argument("--pretrain", type=int, default=1000, help="pretraining steps")
    parser.add_argument("--home", type=Path, help="folder for the cells; a temporary one unless given")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, options.home or Path(folder))
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"dense {found['dense']:.3f}; lean over default, mean over seeds: {found['lean_over_default']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
