"""What the page says first: the study in a few lines, each made of the numbers, tests and bars further down."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.study_bars import NOT_MET, Bar, counted
from analysis.study_data import FULL, Study, best, match, millions, number, signed
from analysis.verdicts import Verdict, verdicts

HEAD = "## In short\n"


def summary(study: Study, bars: Sequence[Bar]) -> list[str]:
    """Sentences on the winner, the bars and the parts of the method."""
    return [*_winner(study), _bars(bars), *_parts(study)]


def _winner(study: Study) -> list[str]:
    """Ours against the best other sparse row at the main budget, text by text."""
    lines = []
    for name, metric in study.texts:
        rival = best(study.rivals, metric)
        found = match(study.ours, rival, metric)
        if found is None:
            lines.append(f"{name} at {millions(study.main)} tokens: ours or every rival is absent.")
            continue
        known = sum(row.estimate(metric) is not None for row in study.rivals)
        lines.append(
            f"{name} at {millions(study.main)} tokens: {found.row.label} {number(found.row.estimate(metric))}; "
            f"the best of {known} other 2:4 rows ({found.other.label}) {number(found.other.estimate(metric))}; "
            f"difference {signed(found)}{'' if found.whole else ', seeds missing'}."
        )
    return lines


def _bars(bars: Sequence[Bar]) -> str:
    missed = [bar for bar in bars if bar.verdict.startswith(NOT_MET)]
    text = f"Of {len(bars)} bars set before, {counted(bars)}"
    return f"{text}. Not met: {'; '.join(bar.asked for bar in missed)}." if missed else f"{text}."


def _parts(study: Study) -> list[str]:
    """Which parts of the method its ablations show to matter: worse, or better, without them on every text."""
    found = verdicts(study.table_3, study.texts, FULL)
    by_row: dict[str, list[Verdict]] = {}
    for one in found:
        row = study.table_3.row(one.row)
        if row is not None and not row.is_reference:
            by_row.setdefault(one.row, []).append(one)
    groups: dict[str, list[str]] = {"worse": [], "better": [], "both": [], "other": []}
    for row_verdicts in by_row.values():
        said = {one.says for one in row_verdicts}
        whole = len(row_verdicts) == len(study.texts) and said <= {"worse", "better"}
        groups["other" if not whole else "both" if len(said) > 1 else said.pop()].append(row_verdicts[0].label)
    if not by_row:
        return ["Which parts of the method matter: no ablation has all its seeds yet."]
    names = {
        "worse": "Significantly worse than the whole method on every text",
        "better": "Significantly better than it on every text",
        "both": "Better than it on one text and worse on another, both significantly",
        "other": "Shown to differ from it on some texts alone, or on none",
    }
    absent = [row.label for row in study.table_3.rows if not row.is_reference and row.row not in {*by_row, FULL}]
    lines = [f"{names[group]}: {', '.join(labels) or 'none'}." for group, labels in groups.items()]
    return [*lines, f"Without all their seeds yet, and so not tested: {', '.join(absent)}."] if absent else lines
