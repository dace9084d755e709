"""Whether masks and curvature kept in few bytes cost quality: one tiny model, annealed in each way, seed by seed.

python benchmarks/lean_storage.py [--seeds 3] [--steps 300] [--pretrain 1000] [--update-every 1]
    [--model FOLDER --text FILE] [--home DIR] [--json]

A tiny LLaMA is pretrained on the demo's text and annealed to 2:4 by the method's defaults, by its lean form (m and
hard mask in 16 bits, average of squared gradients in bfloat16, a layer's statistics from every 16th row), and by the
defaults and the lean form with the statistics of the update before, and by the lean form with Adam's moments in 8 bits.
Printed: the held-out perplexity of each, and of the finished masks the share on which it agrees with the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import load_file

from benchmarks.train import DEFAULT, LEAN
from sparseforge_core.data.corpora import Corpus, PythonDocs, TextFiles
from sparseforge_core.evaluate.suites import HELDOUT
from sparseforge_core.methods import Dense, DenseControl, SparseForge
from sparseforge_core.models.hub import weights_digest
from sparseforge_core.models.sources import Local, ModelSource, Tiny, TrainedBPE
from sparseforge_core.objective import Distill
from sparseforge_core.opening import cell_folder
from sparseforge_core.recipe import Cell, Recipe, Trained, TrainPlan
from sparseforge_core.run import evaluate_cell, train_cell
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.sparsity.patterns import nm

LAST: dict[str, Any] = {"statistics_rows": 1, "statistics_of": "last-update"}
WAYS: dict[str, tuple[SparseForge, Literal["float32", "8-bit"]]] = {
    "default": (DEFAULT, "float32"),
    "lean": (LEAN, "float32"),
    "default_last": (dataclasses.replace(DEFAULT, **LAST), "float32"),
    "lean_last": (dataclasses.replace(LEAN, **LAST), "float32"),
    "lean_8_bit": (LEAN, "8-bit"),
}
"""Name -> method, and how Adam's moments are kept."""

CORPUS = PythonDocs()
TEXT = dataclasses.replace(HELDOUT, window=128, limit=160)


def pretraining(steps: int) -> Recipe:
    """The dense model that all start from."""
    plan = TrainPlan(steps=steps, sequences=8, length=128, lr=WarmupLinear(peak=4e-3))
    source = Tiny(architecture="llama", tokenizer=TrainedBPE(corpus=CORPUS, size=2048))
    return Recipe(model=source, method=DenseControl(), corpus=CORPUS, train=plan)


def annealing(name: str, source: ModelSource, corpus: Corpus, steps: int, update_every: int) -> Recipe:
    """One way from there to 2:4."""
    method, moments = WAYS[name]
    plan = TrainPlan(steps=steps, sequences=8, length=128, lr=WarmupLinear(peak=2e-3), moments=moments)
    return Recipe(
        model=source,
        method=dataclasses.replace(method, update_every=update_every),
        corpus=corpus,
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
    """Every way at every seed."""
    if options.model is None:
        dense = pretraining(options.pretrain)
        source: ModelSource = Trained(recipe=dense, seed=0)
        corpus: Corpus = CORPUS
        base = perplexity(Cell(recipe=dense), home)
    else:
        source = Local(path=str(options.model), sha256=weights_digest(options.model))
        corpus = CORPUS if options.text is None else TextFiles.of(options.text)
        base = perplexity(Cell(recipe=Recipe(model=source, method=Dense(), corpus=corpus)), home)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        cells = {
            name: Cell(recipe=annealing(name, source, corpus, options.steps, options.update_every), seed=seed)
            for name in WAYS
        }
        found = {name: perplexity(cell, home) for name, cell in cells.items()}
        same = {name: agreement([cells["default"], cell], home) for name, cell in cells.items() if name != "default"}
        rows.append({"seed": seed, "perplexity": found, "same_mask": same})
        print(rows[-1], flush=True)
    over = {
        name: statistics.mean(row["perplexity"][name] / row["perplexity"]["default"] for row in rows) for name in WAYS
    }
    return {"dense": base, "rows": rows, "over_default": over}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the annealing")
    parser.add_argument("--steps", type=int, default=300, help="annealing steps, of 1,024 tokens")
    parser.add_argument("--pretrain", type=int, default=1000, help="pretraining steps")
    parser.add_argument("--model", type=Path, help="a pretrained model's folder, instead of a pretraining")
    parser.add_argument("--text", type=Path, help="with --model: a file of documents, instead of the demo's text")
    parser.add_argument("--update-every", type=int, default=1, help="steps between mask updates")
    parser.add_argument("--home", type=Path, help="folder for the cells; a temporary one unless given")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, options.home or Path(folder))
    if options.json:
        print(json.dumps(found))
        return 0
    over = ", ".join(f"{name} {ratio:.4f}" for name, ratio in found["over_default"].items())
    print(f"dense {found['dense']:.3f}; over the default's perplexity, mean over seeds: {over}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
