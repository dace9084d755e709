"""Tables 1-7 and the accuracy-vs-tokens figure, from the results store alone.

python analysis/make_tables.py [--db URL] [--out DIR] [--only table-2] [--strict]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    # Started as a script: the checkout takes the place of this folder, whose file names would hide other modules.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from analysis.aside import Submit, aside, hasty, here
from analysis.drawing import drawn, get_ready
from analysis.exhibits import EXHIBITS, FIGURES, SHOWN, TABLES
from analysis.frames import ExhibitData, exhibit_data, planned_metrics
from analysis.hypertext import to_html
from analysis.items import Bank
from analysis.render import to_csv, to_latex, to_markdown
from analysis.table import Table
from analysis.terminal import to_text
from analysis.verdicts import verdicts_csv
from sparseforge_core.errors import IncompleteExhibit, SparseForgeError, unknown
from sparseforge_core.store.shown import ShownCurve

if TYPE_CHECKING:
    from sparseforge_core.store.results import Results

LISTED = 5
"""Missing results of an exhibit that the report names one by one."""


@dataclass
class Report:
    """What was written, and what is missing of it."""

    grid: str
    files: list[Path] = field(default_factory=list)
    missing: dict[str, list[tuple[str, str, str, str]]] = field(default_factory=dict)
    """(row, cell, stage, status) of what is planned and not done, by exhibit."""
    empty: list[str] = field(default_factory=list)
    """Exhibits that this grid has no rows for."""
    tables: dict[str, Table] = field(default_factory=dict)
    """What the written tables are, by exhibit."""

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        files = [str(path) for path in self.files]
        return {"grid": self.grid, "files": files, "missing": self.missing, "empty": self.empty}

    @property
    def partial(self) -> bool:
        """Whether anything that the grid plans is missing."""
        return bool(self.missing)


def make_tables(
    results: Results, grid: str | None, out: Path, only: Sequence[str] = (), strict: bool = False
) -> Report:
    """Write the exhibits of a grid under OUT/tables and OUT/figures.

    Raises SparseForgeError for an unknown exhibit or grid, an exhibit of `only` that the grid has no rows for, or a
    folder that cannot be written; MixedSuites for a column that would hold numbers that do not compare; with `strict`
    IncompleteExhibit if anything is partial, after writing. Files are replaced whole or not at all.
    """
    with hasty(), _drawing(only) as submit:
        report = _make(results, grid, out, only, submit)
    if strict and report.partial:
        raise IncompleteExhibit(f"{', '.join(report.missing)} of grid {report.grid} lack results")
    return report


def _drawing(only: Sequence[str]) -> AbstractContextManager[Submit]:
    """The process that draws, if a figure is wanted: it gets ready while this one still reads."""
    for name in only:
        if name not in EXHIBITS:
            raise SparseForgeError(unknown("exhibit", name, EXHIBITS))
    return aside(get_ready) if not only or set(only) & set(FIGURES) else nullcontext(here)


def _make(results: Results, grid: str | None, out: Path, only: Sequence[str], submit: Submit) -> Report:
    report = Report(results.grid(grid)["name"])
    wanted = list(dict.fromkeys(only or EXHIBITS))
    material = collect(results, report.grid)
    found = {name: FIGURES[name](material.exhibits, material.curves) for name in wanted if name in FIGURES}
    drawings = {name: drawing for name, drawing in found.items() if drawing is not None}
    pictures = submit("the figures", drawn, drawings)
    made = {name: _table_files(material, name, out, report.tables) for name in wanted if name in TABLES}
    for name, bodies in pictures().items():
        base = out / "figures" / name
        files = {base.with_suffix(ending): body for ending, body in bodies.items()}
        made[name] = {base.with_suffix(".csv"): drawings[name].csv().encode(), **files}
    for exhibit in wanted:
        if not made.get(exhibit):
            report.empty.append(exhibit)
        elif exhibit in material.exhibits and material.exhibits[exhibit].missing:
            report.missing[exhibit] = material.exhibits[exhibit].missing
    if only and report.empty:
        raise SparseForgeError(
            f"grid {report.grid} has no rows for {', '.join(report.empty)}; --grid names another grid"
        )
    for exhibit in wanted:
        for path, body in made.get(exhibit, {}).items():
            write(path, body)
            report.files.append(path)
    return report


@dataclass
class Material:
    """All that the exhibits of a grid are made of."""

    grid: str
    title: str
    exhibits: dict[str, ExhibitData]
    curves: list[ShownCurve]


def collect(results: Results, grid: str) -> Material:
    """Read a grid's exhibits and curves. Raises MixedSuites for a column that would hold what does not compare."""
    about = results.grid(grid)
    suites, bank = results.suite_specs(), Bank(results.outcomes(grid))
    metrics = {metric.rpartition(":")[2] for suite in suites.values() for metric in planned_metrics(suite)}
    slots, measured, missing = results.slots(grid), results.measurements(grid, metrics), results.missing(grid)
    found = {}
    for exhibit in SHOWN:
        published = results.published(exhibit) if about["published"] else []
        found[exhibit] = exhibit_data(exhibit, slots, measured, missing, published, suites, bank)
    return Material(grid, about["title"], found, results.curves(grid))


def _table_files(material: Material, exhibit: str, out: Path, made: dict[str, Table]) -> dict[Path, bytes]:
    data = material.exhibits[exhibit]
    if not data.rows and not data.published:
        return {}
    table = made[exhibit] = TABLES[exhibit](data)
    base = out / "tables" / exhibit
    texts = {".md": to_markdown(table), ".tex": to_latex(table), ".csv": to_csv(table), ".html": to_html(table)}
    if table.verdicts:
        texts[".tests.csv"] = verdicts_csv(table.verdicts)
    return {base.with_suffix(ending): text.encode() for ending, text in texts.items()}


def write(path: Path, body: bytes) -> None:
    """Replace a file whole or not at all. Raises SparseForgeError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(body)
        temporary.replace(path)
    except OSError as error:
        raise SparseForgeError(
            f"{path} cannot be written ({error.strerror}); name another folder with --out"
        ) from error
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


def run_make_tables(
    url: str,
    home: Path,
    *,
    grid: str | None = None,
    out: Path | None = None,
    only: Sequence[str] | None = None,
    strict: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> int:
    """The command behind `make_tables.py` and `sparseforge tables`; returns the exit code.

    Raises IncompleteExhibit in strict mode when anything is partial (everything is written all the same).
    """
    with hasty(), _drawing(only or ()) as submit:
        from sparseforge_core.store.results import Results  # a quarter of a second, in which the other process imports

        results = Results(url)
        name = results.grid(grid)["name"]
        target = out or home / name
        report = _make(results, name, target, only or (), submit)
    if as_json:
        print(json.dumps(report.as_json(), indent=1))
    elif not quiet:
        for table in report.tables.values() if only else ():
            print(to_text(table, color=may_color(), width=columns()) + "\n")
        print(f"grid {name}{'' if grid else ' (the one planned last)'}: {len(report.files)} files in {target}")
        for exhibit in report.empty:
            what = "rows" if exhibit in SHOWN else "rows or training curves"
            print(f"  {exhibit}: this grid has no {what} for it")
    fill = _fill_command(url, home, name)
    if not as_json:
        _print_missing(report, fill)
    if strict and report.partial:
        raise IncompleteExhibit(f"{', '.join(report.missing)} of grid {name} lack results; fill them with: {fill}")
    return 0


def columns() -> int | None:
    """Letters of a line of standard output; None where it is no terminal and $COLUMNS says nothing."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() or os.environ.get("COLUMNS") else None


def may_color() -> bool:
    """Whether standard output is a terminal that shows bold, and nobody has said no: https://no-color.org."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _fill_command(url: str, home: Path, grid: str) -> str:
    """The command that would run what is missing, on the same store."""
    words = ["sparseforge"]
    if home.resolve() != Path(os.environ.get("SPARSEFORGE_HOME") or "runs").resolve():
        words += ["--home", str(home)]
    if url not in (
        os.environ.get("SPARSEFORGE_DB"),
        f"sqlite:///{home / 'store.db'}",
        f"sqlite:///{home.resolve() / 'store.db'}",
    ):
        words += ["--db", url]
    return shlex.join([*words, "run", grid])


def _print_missing(report: Report, fill: str) -> None:
    for exhibit, gaps in report.missing.items():
        print(f"  {exhibit}: {len(gaps)} planned results are missing")
        for row, cell, stage, status in gaps[:LISTED]:
            print(f"    {row}: cell {cell}, stage {stage}: {status}")
        if len(gaps) > LISTED:
            print(f"    and {len(gaps) - LISTED} more")
    if report.missing:
        print(f"fill what is missing with: {fill}")
    if any(status == "failed" for gaps in report.missing.values() for *_, status in gaps):
        print(f"see why some failed with: {fill.replace(' run ', ' status ')}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 0 written, 2 bad input or (with --strict) something partial."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 written, 2 bad input, or something partial with --strict.",
    )
    parser.add_argument("--home", type=Path, help="folder of the runs (default $SPARSEFORGE_HOME or runs)")
    parser.add_argument("--db", help="results store (default $SPARSEFORGE_DB or sqlite:///HOME/store.db)")
    parser.add_argument("--grid", help="default: the grid planned last")
    parser.add_argument("--out", type=Path, help="folder (default HOME/GRID)")
    parser.add_argument(
        "--only", action="extend", nargs="+", metavar="EXHIBIT", help="exhibits, such as table-2; may be repeated"
    )
    parser.add_argument("--strict", action="store_true", help="exit 2 when anything is partial")
    parser.add_argument("--quiet", action="store_true", help="say only what is missing")
    parser.add_argument("--json", action="store_true", help="as JSON: the files, what is missing, what is empty")
    options = parser.parse_args(arguments)
    home = Path(options.home or os.environ.get("SPARSEFORGE_HOME") or "runs")
    url = options.db or os.environ.get("SPARSEFORGE_DB") or f"sqlite:///{home / 'store.db'}"
    try:
        return run_make_tables(
            url,
            home,
            grid=options.grid,
            out=options.out,
            only=options.only,
            strict=options.strict,
            quiet=options.quiet,
            as_json=options.json,
        )
    except SparseForgeError as error:
        print(f"make_tables: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = main()
    gc.freeze()  # a last collection would look through every record before the process may end
    sys.exit(code)
