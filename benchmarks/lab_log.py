"""The tables of docs/lab-log.md: mean training losses over stretches of steps, and held-out perplexity, of kept cells.

python benchmarks/lab_log.py [results/smollm2/lab] [--stretches 1-40 146-250 331-366]

Then what was explored many at a time (`explored.jsonl`, `forgetting.jsonl`, `rates.jsonl`, `texts.jsonl`: one
line a run), best first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flows.grids.planned import expand
from flows.grids.study_lab import ideas
from sparseforge_core.tracking.tracker import read_journal


def losses(folder: Path, first: int, last: int) -> str:
    """Mean cross-entropy and KL over the steps of a stretch that the journal has; empty where it has none."""
    lines, _ = read_journal(folder / "train" / "journal.jsonl")
    logged = {line["step"]: line["scalars"] for line in lines if "scalars" in line}
    inside = [scalars for step, scalars in logged.items() if first <= step <= last]
    if not inside or max(logged) < last:
        return ""
    found = {name: sum(scalars[name] for scalars in inside) / len(inside) for name in ("loss/task", "loss/kl")}
    return f"{found['loss/task']:.3f}, {found['loss/kl']:.3f}"


def perplexity(folder: Path) -> str:
    """The cell's held-out perplexity, empty where it was not evaluated."""
    for path in folder.glob("heldout-*/measurements.json"):
        rows = json.loads(path.read_text())["measurements"]
        return next(f"{row['value']:.2f}" for row in rows if row["metric"] == "perplexity")
    return ""


COLUMNS = {
    "heldout_perplexity": "held-out",
    "wikitext2_valid_perplexity": "WikiText-2 validation",
    "shard_07_perplexity": "shard 07",
    "loss_task": "CE at the end",
    "loss_kl": "KL at the end",
}


def explored(path: Path) -> list[str]:
    """Lines of a table of the runs in a file, by the perplexity of books that they do not train on."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    columns = {name: title for name, title in COLUMNS.items() if any(name in row for row in rows)}
    several = len({row.get("seed") for row in rows}) > 1
    lines = [f"| {path.stem} | " + " | ".join(columns.values()) + " |", "|---" * (1 + len(columns)) + "|"]
    for row in sorted(rows, key=lambda row: row.get("shard_07_perplexity") or row["heldout_perplexity"]):
        cells = ["" if row.get(name) is None else format(row[name], FORMATS.get(name, ".2f")) for name in columns]
        seed = f", seed {row['seed']}" if several else ""
        lines.append(f"| {row['idea']}{seed} | " + " | ".join(cells) + " |")
    return lines


FORMATS = {"loss_task": ".3f", "loss_kl": ".3f"}


def main(arguments: list[str] | None = None) -> int:
    """Print the table, a row for each folder, by the name that the grid of ideas gives it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "results" / "smollm2" / "lab")
    parser.add_argument("--stretches", nargs="+", default=["1-40", "146-250", "331-366"])
    options = parser.parse_args(arguments)
    names = {cell.key: cell.variant for cell in expand(ideas()).cells}
    print("| cell | " + " | ".join(f"steps {stretch}: CE, KL" for stretch in options.stretches) + " | perplexity |")
    for folder in sorted(path for path in options.folder.iterdir() if path.is_dir()):
        cells = [losses(folder, *map(int, stretch.split("-"))) for stretch in options.stretches]
        name = names.get(folder.name, folder.name)
        print(f"| {name} | " + " | ".join(cells) + f" | {perplexity(folder)} |")
    for path in sorted(options.folder.glob("*.jsonl")):
        print("\n" + "\n".join(explored(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
