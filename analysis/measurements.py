"""Every measurement of a grid as one CSV, for people who bring their own tools.

python analysis/measurements.py [--db URL] [--grid NAME] [--out FILE]
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    # Started as a script: the checkout takes the place of this folder, whose file names would hide other modules.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from analysis.make_tables import write
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.store.results import Results
from sparseforge_core.store.shown import TidyMeasurement


def measurements_csv(results: Results, grid: str) -> str:
    """The measurements of a grid's finished stages, a row each, in a fixed order; numbers as exact as the store's."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(TidyMeasurement._fields)
    writer.writerows(results.tidy(grid))
    return out.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 written, 2 refused."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 written, 2 bad input.",
    )
    parser.add_argument("--db", default=os.environ.get("SPARSEFORGE_DB", "sqlite:///runs/store.db"), metavar="URL")
    parser.add_argument("--grid", help="default: the last one planned")
    parser.add_argument("--out", type=Path, default=Path("measurements.csv"))
    parser.add_argument("--quiet", action="store_true", help="say nothing")
    parser.add_argument("--json", action="store_true", help="one line of JSON: the file and how many")
    options = parser.parse_args(arguments)
    try:
        results = Results(options.db)
        try:
            text = measurements_csv(results, results.grid(options.grid)["name"])
        finally:
            results.close()
        write(options.out, text.encode())
    except SparseForgeError as error:
        print(f"measurements: {error}", file=sys.stderr)
        return 2
    count = text.count("\n") - 1
    if options.json:
        print(json.dumps({"file": str(options.out), "measurements": count}))
    elif not options.quiet:
        print(f"{count:,} measurements in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
