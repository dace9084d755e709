"""Table 7: decoding speed for prompt and output lengths, and the bytes of the weights."""

from __future__ import annotations

from analysis.aggregate import Estimate, ratio
from analysis.frames import DECODE, ExhibitData, ExhibitRow
from analysis.notes import REPEATS, standard_notes
from analysis.table import EMPTY, Cell, Column, Line, Table, published_table

MIB = 2.0**20
DENSE, SPARSE = "dense", "sparseforge"


def table_7(data: ExhibitData) -> Table:
    """For each model one line a (prompt, output) pair, then the weights; dense, sparse and their ratio."""
    columns = [Column("Dense", digits=1), Column("2:4", digits=1), Column("Ratio", digits=3)]
    table = Table(
        data.exhibit, "Table 7. Decoding throughput and weight memory", data.caption, "Prompt x output", columns
    )
    groups = list(dict.fromkeys(row.group for row in data.rows))
    pairs = sorted({(int(p), int(o)) for suite in data.of_kind("throughput") for p, o in suite["prompt_output"]})
    for group in groups:
        dense, sparse = data.row(f"{group}/{DENSE}"), data.row(f"{group}/{SPARSE}")
        prefix = f"{group}: " if len(groups) > 1 else ""
        for prompt, output in pairs:
            metric = f"{DECODE}{prompt}x{output}"
            cells = _speed(dense, metric), _speed(sparse, metric)
            table.lines.append(
                _line(f"{group}/{prompt}x{output}", f"{prefix}{prompt:,} x {output:,} (tokens/s)", *cells)
            )
        bytes_ = _weights(dense, "weight_bytes_dense"), _weights(sparse, "weight_bytes_packed")
        table.lines.append(_line(f"{group}/weights", f"{prefix}weights, bf16 (MiB)", *bytes_))
    table.notes += standard_notes(table, data, over=REPEATS)
    table.published = published_table(table, data.published)
    return table


def _line(name: str, label: str, dense: Cell, sparse: Cell) -> Line:
    found = ratio(sparse.estimate, dense.estimate)
    return Line(name, label, [dense, sparse, Cell(found, sources=(*dense.sources, *sparse.sources))])


def _speed(row: ExhibitRow | None, metric: str) -> Cell:
    if row is None or metric not in row.plans:
        return EMPTY
    return Cell(
        row.timed(metric),
        planned=len(row.seeds),
        diverged=row.diverged.get(metric, 0),
        sources=row.places(metric),
    )


def _weights(row: ExhibitRow | None, metric: str) -> Cell:
    if row is None:
        return EMPTY
    found = row.estimate(metric)
    estimate = None if found is None else Estimate(found.mean / MIB, None, 1, None)
    return Cell(estimate, planned=1, sources=row.places(metric))
