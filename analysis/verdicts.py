"""What a table's differences are worth: each row against its reference, with test, interval, effect, equivalence."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.frames import ExhibitData, ExhibitRow
from analysis.items import Items
from analysis.significance import LEVEL, Apart, Comparison, compared, equivalences, holm, intervals, paired, pool

ACCURACY_MARGIN = 0.01
"""Half the width of what counts as equal accuracy: one point."""
PERPLEXITY_MARGIN = 0.01
"""The same for the log of perplexity: one percent of perplexity."""


@dataclass(frozen=True)
class Verdict:
    """One row against its reference in one column; accuracies are fractions, perplexities compared as logarithms."""

    row: str
    label: str
    reference: str
    column: str
    found: Comparison
    low: float
    high: float
    """95 % bootstrap interval over seeds and items."""
    corrected: float
    """p after Holm's correction over the rows that are compared with a reference in this column."""
    margin: float
    equivalent: float
    """p of two one-sided tests against the margin."""
    higher_is_better: bool

    @property
    def says(self) -> str:
        """better, worse, equivalent or undecided; significant comes before equivalent."""
        if self.corrected <= LEVEL:
            return "better" if (self.found.difference > 0) == self.higher_is_better else "worse"
        return "equivalent" if self.equivalent <= LEVEL else "undecided"


def verdicts(data: ExhibitData, columns: Sequence[tuple[str, str]], reference: str) -> list[Verdict]:
    """Every row with items against the row `reference` of its group; `columns` are (title, metric).

    Rows that lack seeds are left out: a comparison that waits for results is none.
    """
    found = []
    for title, metric in columns:
        pairs = _pairs(data, metric, reference)
        several = pool([items for _, _, items, _ in pairs] + [other for *_, other in pairs])
        apart = [Apart.of(items, other) for _, _, items, other in pairs]
        tested = compared(apart, several)
        corrected = holm([one.p for one in tested])
        accuracy = not metric.endswith(":perplexity")
        margin = ACCURACY_MARGIN if accuracy else PERPLEXITY_MARGIN
        column = title if accuracy else f"log {title}"
        judged = zip(pairs, tested, corrected, intervals(apart), equivalences(tested, margin), strict=True)
        for (row, to, *_), one, p, (low, high), equal in judged:
            found.append(Verdict(row.row, row.label, to.label, column, one, low, high, p, margin, equal, accuracy))
    return found


def _pairs(data: ExhibitData, metric: str, reference: str) -> list[tuple[ExhibitRow, ExhibitRow, Items, Items]]:
    found = []
    for row in data.rows:
        to = data.row(f"{row.group}/{reference}" if row.group else reference)
        if to is None or to is row:
            continue
        items, other = row.items(metric), to.items(metric)
        if items is not None and other is not None and paired(items, other):
            found.append((row, to, items, other))
    return found


HEAD = (
    "row", "label", "reference", "column", "difference", "boot95 low", "boot95 high", "std error", "df", "p", "p holm",
    "test", "effect d", "margin", "p tost", "verdict", "items", "seeds", "reference seeds",
)  # fmt: skip


def verdicts_csv(found: Sequence[Verdict]) -> str:
    """One line a comparison; differences in fractions or nats, to six significant digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEAD)
    for one in found:
        of = one.found
        numbers = [_short(v) for v in (of.difference, one.low, one.high, of.error, of.freedom, of.p, one.corrected)]
        tail = [_short(of.effect), _short(one.margin), _short(one.equivalent), one.says, of.n, *of.seeds]
        writer.writerow([one.row, one.label, one.reference, one.column, *numbers, of.test, *tail])
    return out.getvalue()


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def verdict_notes(found: Sequence[Verdict], column: str) -> list[str]:
    """One sentence on one column: who is better, worse, equivalent or undecided against which reference."""
    own = [one for one in found if one.column == column]
    if not own:
        return []
    parts = []
    for word in ("better", "worse", "equivalent", "undecided"):
        labels = [one.label for one in own if one.says == word]
        if labels:
            parts.append(f"{word}: {', '.join(labels)}")
    references = " or ".join(dict.fromkeys(one.reference for one in own))
    margin = "1 point" if own[0].higher_is_better else "1 %"
    return [
        f"{column} against {references if len(set(references.split(' or '))) < 3 else 'the reference of each model'} "
        f"(paired tests on {own[0].found.n:,} items, Holm, 5 %; equivalent: within {margin} by two one-sided tests): "
        f"{'; '.join(parts)}."
    ]
