"""Tables 1-7 and the accuracy-vs-tokens figure, from the results store alone.

    python analysis/make_tables.py [--db URL] [--out DIR] [--only table-2] [--strict]
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.exhibits import EXHIBITS, FIGURE, TABLES
from analysis.figures import accuracy_vs_tokens, figure_csv
from analysis.frames import ExhibitData, exhibit_data
from analysis.render import to_csv, to_latex, to_markdown
from sparseforge_core.errors import IncompleteExhibit, SparseForgeError, unknown
from sparseforge_core.store.results import Results


@dataclass
class Report:
    """What was written, and what is missing of it."""

    grid: str
    files: list[Path] = field(default_factory=list)
    missing: dict[str, list[tuple[str, str, str, str]]] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    """Exhibits that this grid has no rows for."""

    @property
    def partial(self) -> bool:
        """Whether anything that the grid plans is missing."""
        return bool(self.missing)


def make_tables(results: Results, grid: str | None, out: Path, only: Sequence[str] = ()) -> Report:
    """Write the exhibits of a grid under OUT/tables and OUT/figures.

    Raises SparseForgeError for an unknown exhibit or grid, mixed suites in a column, or a folder that cannot be
    written; files are replaced whole or not at all.
    """
    for name in only:
        if name not in EXHIBITS:
            raise SparseForgeError(unknown("exhibit", name, EXHIBITS))
    chosen = results.grid(grid)
    slots, measured, missing = (read(chosen["name"]) for read in (results.slots, results.measurements, results.missing))
    report = Report(chosen["name"])
    ready: dict[Path, bytes] = {}
    for exhibit in only or EXHIBITS:
        published = results.published(exhibit)
        published = published if chosen["published"] else published.iloc[:0]
        data = exhibit_data(exhibit, slots, measured, missing, published)
        if not data.rows and published.empty:
            report.empty.append(exhibit)
            continue
        if data.missing:
            report.missing[exhibit] = data.missing
        ready |= _figure_files(data, out) if exhibit == FIGURE else _table_files(data, out)
    for path, body in ready.items():
        _write(path, body)
        report.files.append(path)
    return report


def _table_files(data: ExhibitData, out: Path) -> dict[Path, bytes]:
    table = TABLES[data.exhibit](data)
    if data.missing:
        table.notes.append(f"Partial: {len(data.missing)} planned results are not in yet.")
    base = out / "tables" / data.exhibit
    texts = {".md": to_markdown(table), ".tex": to_latex(table), ".csv": to_csv(table)}
    return {base.with_suffix(ending): text.encode() for ending, text in texts.items()}


def _figure_files(data: ExhibitData, out: Path) -> dict[Path, bytes]:
    import matplotlib as mpl

    base = out / "figures" / data.exhibit
    figure = accuracy_vs_tokens(data)
    files = {base.with_suffix(".csv"): figure_csv(data).encode()}
    options: dict[str, dict[str, Any]] = {
        ".svg": {"metadata": {"Date": None, "Creator": None}},
        ".png": {"dpi": 200, "metadata": {"Software": None}},
    }
    for ending, arguments in options.items():
        buffer = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": "sparseforge", "svg.fonttype": "none"}):
            figure.savefig(buffer, format=ending[1:], **arguments)
        files[base.with_suffix(ending)] = buffer.getvalue()
    return files


def _write(path: Path, body: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(body)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SparseForgeError(f"{path} cannot be written ({error.strerror}); name another folder with --out") from error


def run_make_tables(
    url: str,
    home: Path,
    *,
    grid: str | None = None,
    out: Path | None = None,
    only: Sequence[str] | None = None,
    strict: bool = False,
    quiet: bool = False,
) -> int:
    """The command behind `make_tables.py` and `sparseforge tables`; returns the exit code.

    Raises IncompleteExhibit in strict mode when anything is partial (everything is written all the same).
    """
    results = Results(url)
    name = results.grid(grid)["name"]
    target = out or home / name
    report = make_tables(results, name, target, only or ())
    if not quiet:
        print(f"grid {name}: {len(report.files)} files in {target}")
        for exhibit in report.empty:
            print(f"  {exhibit}: this grid has no rows for it")
    _print_missing(report)
    if strict and report.partial:
        raise IncompleteExhibit(f"{', '.join(report.missing)} lack results; fill them with: sparseforge run {name}")
    return 0


def _print_missing(report: Report) -> None:
    for exhibit, gaps in report.missing.items():
        print(f"  {exhibit}: {len(gaps)} results missing; fill them with: sparseforge run {report.grid}")
        for row, cell, stage, status in gaps[:5]:
            print(f"    {row}: cell {cell}, stage {stage}: {status}")
        if len(gaps) > 5:
            print(f"    and {len(gaps) - 5} more")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 0 written, 2 bad input or (with --strict) something partial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, help="folder of the runs (default $SPARSEFORGE_HOME or runs)")
    parser.add_argument("--db", help="results store (default $SPARSEFORGE_DB or sqlite:///HOME/store.db)")
    parser.add_argument("--grid", help="default: the grid planned last")
    parser.add_argument("--out", type=Path, help="folder (default HOME/GRID)")
    parser.add_argument("--only", action="append", help="an exhibit, such as table-2; may be repeated")
    parser.add_argument("--strict", action="store_true", help="exit 2 when anything is partial")
    options = parser.parse_args(arguments)
    home = Path(options.home or os.environ.get("SPARSEFORGE_HOME") or "runs")
    url = options.db or os.environ.get("SPARSEFORGE_DB") or f"sqlite:///{home / 'store.db'}"
    try:
        return run_make_tables(url, home, grid=options.grid, out=options.out, only=options.only, strict=options.strict)
    except SparseForgeError as error:
        print(f"make_tables: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
