"""How hard the soft mask is just before the projection: mean |m - m_hat| on real weights, with a named preset.

python benchmarks/soft_hard_gap.py [--preset lean] [--layers 6] [--steps 400] [--json]

The model is the packaged SmolLM2-135M, or its first blocks, where the whole would take hours on a CPU; the text is that
of the demo. Printed: the share of entries between 0.1 and 0.9 and the gap, through the run, from its journal.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparseforge_core.data.corpora import PythonDocs
from sparseforge_core.methods.phases import Phases
from sparseforge_core.models.hub import load_model, load_tokenizer, weights_digest
from sparseforge_core.models.sources import Local, Packaged
from sparseforge_core.presets import PRESETS, preset_named
from sparseforge_core.recipe import Cell
from sparseforge_core.run import train_cell
from sparseforge_core.tracking.tracker import read_journal

SOURCE = Packaged(name="smollm2-135m")


def first_blocks(layers: int, home: Path) -> Local:
    """The model cut to its first blocks, with its tokenizer, as a folder."""
    model: Any = load_model(SOURCE, home)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    folder = home / f"smollm2-{layers}-blocks"
    model.save_pretrained(folder)
    load_tokenizer(SOURCE, home).save_pretrained(folder)
    return Local(path=str(folder), sha256=weights_digest(folder))


def measure(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Train, and read the gap from the journal."""
    preset = preset_named(options.preset)
    source = SOURCE if options.layers is None else first_blocks(options.layers, home)
    recipe = preset.recipe(
        source, PythonDocs(), steps=options.steps, sequences=options.sequences, length=options.length
    )
    folder = home / "train"
    train_cell(Cell(recipe=recipe), folder, home, on_step=lambda p: print(f"\r{p.step}/{p.steps}", end="", flush=True))
    print()
    phases = Phases.of(preset.method, options.steps)
    lines, _ = read_journal(folder / "journal.jsonl")
    rows = [{"step": line["step"], **line["scalars"]} for line in lines if "scalars" in line]
    shown = [
        {name: row[name] for name in ("step", "mask/mid_fraction", "mask/soft_hard_gap")}
        for row in rows
        if row["step"] < phases.freeze
    ]
    weights = json.loads((folder / "measurements.json").read_text())["measurements"]
    masked = next(row["value"] for row in weights if row["metric"] == "masked_parameters")
    return {
        "preset": preset.name,
        "masked_parameters": masked,
        "projection_at": phases.freeze,
        "updates": phases.updates(phases.freeze),
        "last_before_projection": shown[-1],
        "rows": shown,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="lean")
    parser.add_argument("--layers", type=int, help="the first so many blocks only; the whole model without it")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    if options.json:
        print(json.dumps(found))
        return 0
    for row in found["rows"][:: max(1, len(found["rows"]) // 12)]:
        print(f"step {row['step']:>6}  mid {row['mask/mid_fraction']:.4f}  gap {row['mask/soft_hard_gap']:.6f}")
    last = found["last_before_projection"]
    print(f"{found['preset']}, {found['masked_parameters']:,.0f} masked weights, {found['updates']} updates")
    print(f"mean |m - m_hat| {last['mask/soft_hard_gap']:.6f} at step {last['step']} of {found['projection_at']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
