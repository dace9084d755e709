"""The study's report, results/README.md, from the results store alone; rows that are not in yet are said to be absent.

python analysis/study.py [--db URL] [--grid smollm2-study] [--trials smollm2-trials] [--unordered smollm2-unordered]
                         [--books-alone smollm2-books] [--second gpt2-study] [--figure FILE] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    # Started as a script: the checkout takes the place of this folder, whose file names would hide other modules.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from analysis.make_tables import write
from analysis.study_report import report
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.store.results import Results

STORE = "results/smollm2/store.db"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 written, 2 refused."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 written, 2 bad input.",
    )
    parser.add_argument("--db", default=f"sqlite:///{STORE}", metavar="URL", help=f"default sqlite:///{STORE}")
    parser.add_argument("--grid", default="smollm2-study")
    parser.add_argument("--trials", default="smollm2-trials", metavar="GRID", help="the grid of the trials")
    parser.add_argument(
        "--unordered",
        default="smollm2-unordered",
        metavar="GRID",
        help="the grid of ours with channels as they stand; it has a section once ours is another recipe",
    )
    parser.add_argument("--books-alone", default="smollm2-books", metavar="GRID", help="the grid on books alone")
    parser.add_argument("--second", default="gpt2-study", metavar="GRID", help="the grid of the second model")
    parser.add_argument(
        "--figure",
        type=Path,
        default=Path("results/smollm2/figures/accuracy-vs-tokens.svg"),
        help="the figure that make_tables.py wrote; the page links it, and ablations.svg beside it, if they are there",
    )
    parser.add_argument("--out", type=Path, default=Path("results/README.md"))
    parser.add_argument("--quiet", action="store_true", help="say nothing")
    parser.add_argument("--json", action="store_true", help="one line of JSON: the grid and the file")
    options = parser.parse_args(arguments)
    try:
        results = Results(options.db)
        try:
            drawn = {"figure": options.figure, "ablations": options.figure.with_name("ablations.svg")}
            pictures = {
                name: os.path.relpath(path, options.out.parent) for name, path in drawn.items() if path.is_file()
            }
            store = options.db.removeprefix("sqlite:///")
            grid = results.grid(options.grid)["name"]
            text = report(
                results,
                grid,
                store=store,
                trials_grid=options.trials,
                unordered_grid=options.unordered,
                books_grid=options.books_alone,
                second_grid=options.second,
                **pictures,
            )
        finally:
            results.close()
        write(options.out, text.encode())
    except SparseForgeError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({"grid": grid, "file": str(options.out)}))
    elif not options.quiet:
        print(f"{options.out}: {text.count(chr(10)):,} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
