"""The study's rows by what they mean: our method, its rivals, budgets, ablations; and one row against another."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from analysis.accuracy_tables import MEAN
from analysis.aggregate import Estimate
from analysis.frames import ExhibitData, ExhibitRow
from analysis.significance import compare, interval, paired

OURS, PAPER, DENSE, CONTROL, FULL = "improved", "paper", "dense", "dense-control", "full"
"""Rows of Tables 2 and 3, as the grid names them."""
MILLION = 1_000_000


@dataclass(frozen=True)
class Match:
    """One row against another on one metric: a relative perplexity, or an accuracy in points."""

    row: ExhibitRow
    other: ExhibitRow
    metric: str
    difference: float
    """Of perplexity: ratio minus 1; of accuracy: in fractions. Below zero: `row` has the smaller number."""
    low: float | None = None
    high: float | None = None
    """95 % bootstrap interval over items and seeds; None where the items are not to be had."""
    p: float | None = None
    """Two-sided, paired over items, over seeds where there are several; not corrected."""

    @property
    def relative(self) -> bool:
        """Whether it is a perplexity."""
        return self.metric != MEAN

    @property
    def better(self) -> float:
        """Above zero where `row` is the better one."""
        return -self.difference if self.relative else self.difference

    @property
    def whole(self) -> bool:
        """Whether both rows have all their seeds."""
        return is_whole(self.row, self.metric) and is_whole(self.other, self.metric)


def is_whole(row: ExhibitRow, metric: str) -> bool:
    """Whether every planned seed of a row has a number, or has none because it diverged."""
    return len(row.values.get(metric, {})) + row.diverged.get(metric, 0) >= len(row.seeds)


def match(row: ExhibitRow | None, other: ExhibitRow | None, metric: str) -> Match | None:
    """Row against row; None unless both have a number. Where seeds are out: over those that both have."""
    if row is None or other is None:
        return None
    items, others = row.items(metric), other.items(metric)
    if items is None or others is None or not paired(items, others):
        known = row.versus(other, metric, log=metric != MEAN)
        if known is None:
            return None
        return Match(row, other, metric, known.mean if metric == MEAN else math.expm1(known.mean))
    found, (low, high) = compare(items, others), interval(items, others)
    if metric == MEAN:
        return Match(row, other, metric, found.difference, low, high, found.p)
    # perplexities are compared as logarithms, whose mean over seeds is that of their geometric mean
    return Match(row, other, metric, math.expm1(found.difference), math.expm1(low), math.expm1(high), found.p)


class Study:
    """The exhibits of the study's grid."""

    def __init__(self, exhibits: dict[str, ExhibitData]) -> None:
        self.table_2, self.table_3 = exhibits["table-2"], exhibits["table-3"]
        self.figure = exhibits["accuracy-vs-tokens"]

    @cached_property
    def texts(self) -> list[tuple[str, str]]:
        """(name, metric) of the perplexities that the tables show."""
        return [(str(suite["name"]), f"{suite['name']}:perplexity") for suite in self.table_2.of_kind("perplexity")]

    @property
    def ours(self) -> ExhibitRow | None:
        """Our method at the main budget."""
        return self.table_2.row(OURS)

    @property
    def rivals(self) -> list[ExhibitRow]:
        """Every other sparse row at the main budget, one-shot ones included."""
        return [row for row in self.table_2.rows if not row.is_reference and row.row != OURS]

    @property
    def main(self) -> int:
        """Tokens of the main budget; 0 where our row is not planned."""
        return self.ours.tokens if self.ours else 0

    @cached_property
    def budgets(self) -> list[int]:
        """The figure's and the main one, in tokens."""
        return sorted({row.tokens for row in self.figure.rows if row.tokens} | {self.main} - {0})

    def at(self, tokens: int) -> tuple[ExhibitRow | None, list[ExhibitRow]]:
        """(ours, its rivals) at a budget: all of Table 2 at the main one, the figure's rows at the others."""
        if tokens == self.main:
            return self.ours, self.rivals
        rows = [row for row in self.figure.rows if row.tokens == tokens and not row.is_reference]
        label = self.ours.label if self.ours else ""
        ours = next((row for row in rows if row.label == label), None)
        return ours, [row for row in rows if row is not ours]

    def lacking(self, tokens: int) -> list[str]:
        """Labels of the figure that have no row at a budget: they were not planned there.

        One that has a single budget is beside the others there, and lacks nowhere.
        """
        ours, rivals = self.at(tokens)
        there = {row.label for row in (ours, *rivals) if row is not None}
        labels = Counter(row.label for row in self.figure.rows if row.tokens)
        return [label for label, budgets in labels.items() if budgets > 1 and label not in there]

    def near(self, tokens: float) -> int | None:
        """The budget nearest to some tokens, if it is within a twentieth."""
        best = min(self.budgets, key=lambda budget: abs(budget - tokens), default=None)
        return best if best is not None and abs(best - tokens) <= 0.05 * tokens else None


def best(rows: list[ExhibitRow], metric: str) -> ExhibitRow | None:
    """The row with the lowest perplexity, or the highest accuracy, of those that have a number."""
    known = [(row, estimate) for row in rows if (estimate := row.estimate(metric)) is not None]
    if not known:
        return None
    sign = -1.0 if metric == MEAN else 1.0
    return min(known, key=lambda pair: sign * pair[1].mean)[0]


def number(estimate: Estimate | None, *, percent: bool = False) -> str:
    """A mean with half its 95 % interval over seeds; `absent` without one."""
    if estimate is None:
        return "absent"
    scale = 100.0 if percent else 1.0
    text = f"{estimate.mean * scale:.2f}"
    return text if estimate.half is None else f"{text} ± {estimate.half * scale:.2f}"


def millions(tokens: float) -> str:
    """A budget for people."""
    return f"{tokens / MILLION:.0f} M"


def signed(found: Match) -> str:
    """A difference with its interval: in percent of perplexity, or in points of accuracy."""
    unit = " %" if found.relative else " points"
    text = f"{100 * found.difference:+.2f}{unit}"
    if found.low is None or found.high is None:
        return text
    return f"{text} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
