"""Table 7: decoding speed for prompt and output lengths, and the bytes of the weights."""

from __future__ import annotations

from analysis.accuracy_tables import _add_published
from analysis.aggregate import Estimate, ratio
from analysis.frames import ExhibitData, ExhibitRow
from analysis.table import Column, Line, Table

RATE = "decode_tokens_per_second/"
MIB = 2.0**20


def table_7(data: ExhibitData) -> Table:
    """One line for each (prompt, output) pair, then the weights; dense, sparse and their ratio."""
    dense = next((row for row in data.rows if row.variant == "dense"), None)
    sparse = next((row for row in data.rows if row.variant == "sparseforge"), None)
    columns = [Column("Dense", digits=1), Column("2:4", digits=1), Column("Ratio", digits=3)]
    table = Table(data.exhibit, "Table 7. Decoding throughput and weight memory", data.caption, "Prompt x output", columns)
    pairs = sorted({metric for metric in data.metrics() if metric.startswith(RATE)}, key=_lengths)
    for metric in pairs:
        prompt, output = _lengths(metric)
        label = f"{prompt:,} x {output:,} (tokens/s)"
        table.lines.append(_line(label, _of(dense, metric), _of(sparse, metric), metric))
    weights = _of(dense, "weight_bytes_dense"), _of(sparse, "weight_bytes_packed")
    table.lines.append(_line("Weights, bf16 (MiB)", _scaled(weights[0]), _scaled(weights[1]), "weights"))
    _add_published(table, data.published)
    return table


def _line(label: str, dense: Estimate | None, sparse: Estimate | None, name: str) -> Line:
    return Line(label, [dense, sparse, ratio(sparse, dense)], [False] * 3, name=name)


def _of(row: ExhibitRow | None, metric: str) -> Estimate | None:
    return None if row is None else row.estimate(metric)


def _scaled(estimate: Estimate | None) -> Estimate | None:
    return None if estimate is None else Estimate(estimate.mean / MIB, None, estimate.n, None)


def _lengths(metric: str) -> tuple[int, int]:
    prompt, _, output = metric.removeprefix(RATE).partition("x")
    return int(prompt), int(output)
