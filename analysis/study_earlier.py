"""The page's sections on how the study was run before: why they are there, every method, all budgets, the bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.render import escape_markdown
from analysis.study_bars import bars, counted
from analysis.study_data import Match, Study, best, match, millions, number, signed
from analysis.study_parts import ABSENT, bar_table, budget_tables, glance, progress
from sparseforge_core.store.results import Results


@dataclass(frozen=True)
class Earlier:
    """A way in which the study was run before, as a grid of its own."""

    title: str
    what: str
    """What differed."""
    why: str
    """Why, and when, it was left."""
    short: str
    """The beginning of its line in the summary."""


BOOKS_ALONE = Earlier(
    title="## The same on books alone",
    what="The study was first run on public-domain books and nothing else, with the same methods (ours "
    "with channels as they stand) and peaks.",
    why="Our reading is that retraining at a high rate on narrow text forgets other text. So every method of the "
    "study, the rivals as well as ours, now reads modern prose beside the books; that was decided after these numbers "
    "were seen. Its first ablations, one seed each, are in the store and in docs/lab-log.md.",
    short="On books alone, as the study was first run",
)
UNORDERED = Earlier(
    title="## The same with channels as they stand",
    what="Ours was first run with the channels of the dense model as they stand; all other rows are "
    "those above, without the rivals in order.",
    why="That channels are put in order was decided on validation text after these numbers were seen (docs/lab-log.md, "
    "sections 14 and 15). The ablations of Table 3 differ from ours as it is here.",
    short="With channels as they stand, as ours was run before",
)

HEAD = """{title}

{what} {state}
{found}
{why}
Nothing was dropped: `python analysis/make_tables.py --db sqlite:///{store} --grid {grid}` writes all tables of it.
"""


def section(results: Results, grid: str, study: Study | None, earlier: Earlier, *, store: str) -> list[str]:
    """The section as parts of Markdown; a store without the grid is said to be. `store` is its file, as named there."""
    if study is None:
        return [ABSENT.format(title=earlier.title, grid=grid)]
    found = " ".join(_standing(study, name, metric) for name, metric in study.texts) + _untrained(study)
    judged = bars(study)
    head = {"title": earlier.title, "what": earlier.what, "why": earlier.why, "state": progress(results, grid)}
    return [
        HEAD.format(**head, found=escape_markdown(found), store=store, grid=grid),
        glance(study),
        "Against retraining tokens; nothing where a row was not trained:\n",
        budget_tables(study),
        f"The same bars, asked of it: {counted(judged)}. A rival with one seed has no interval, only its number.\n",
        bar_table(judged),
    ]


def short(study: Study | None, earlier: Earlier) -> str:
    """In one line: how many bars are met."""
    judged = bars(study) if study else []
    said = f"of the {len(judged)} bars {counted(judged)}" if study else "absent"
    return f"{earlier.short}: {said}."


def _standing(study: Study, name: str, metric: str) -> str:
    """Where ours leads on a text and where not, and whether more tokens did harm."""
    nearest = [(tokens, _against_the_best(study, tokens, metric)) for tokens in study.budgets]
    known = [(tokens, one) for tokens, one in nearest if one is not None]
    if not known:
        return f"On {name} ours or every rival is absent."
    label = known[0][1].row.label
    ahead = [millions(tokens) for tokens, one in known if one.difference < 0]
    behind = [
        f"{millions(tokens)} ({signed(one)} against {one.other.label})" for tokens, one in known if one.difference >= 0
    ]
    lowest = "has the lowest perplexity of the 2:4 rows"
    said = f"On {name} {label} {lowest} at {_listed(ahead)} tokens" if ahead else f"On {name} {label} nowhere {lowest}"
    said += f"; it is behind at {_listed(behind)}." if behind else "."
    (least, best_), (last, latest) = min(known, key=lambda pair: _mean(pair[1])), known[-1]
    if least == last:
        return said
    numbers = [number(one.row.estimate(metric)) for one in (best_, latest)]
    return f"{said} There its own lowest is {numbers[0]}, at {millions(least)}; at {millions(last)} it is {numbers[1]}."


def _untrained(study: Study) -> str:
    """Rows that are not there to compare, budget by budget."""
    lacking = {tokens: study.lacking(tokens) for tokens in study.budgets}
    return "".join(f" Not trained at {millions(t)}: {'; '.join(labels)}." for t, labels in lacking.items() if labels)


def _against_the_best(study: Study, tokens: int, metric: str) -> Match | None:
    ours, rivals = study.at(tokens)
    return match(ours, best(rivals, metric), metric)


def _mean(one: Match) -> float:
    estimate = one.row.estimate(one.metric)
    assert estimate is not None  # a match has both
    return estimate.mean


def _listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([*([", ".join(parts[:-1])] if parts[1:] else []), *parts[-1:]])
