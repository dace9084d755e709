"""The bars that the study set itself before it was run, each with what was measured and whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from analysis.accuracy_tables import MEAN
from analysis.frames import ExhibitRow
from analysis.study_data import DENSE, MILLION, PAPER, Match, Study, best, is_whole, match, millions, number, signed

FROM = 6 * MILLION
"""The budget from which ours has to lead, less what a rounded step takes."""
AHEAD, AHEAD_OF_PAPER = 0.03, 0.05
"""By how much, of perplexity."""
MET, NOT_MET, OPEN = "met", "not met", "not measured"
SO_FAR = " so far"
"""Ends the verdict on what is not all in."""


@dataclass(frozen=True)
class Bar:
    """One bar: what was asked, what was measured, and whether that is enough."""

    asked: str
    found: str
    verdict: str
    """MET, NOT_MET or OPEN; with ' so far' where planned seeds are missing, or rows that other budgets have."""


def bars(study: Study) -> list[Bar]:
    """All of them, in the order in which they were set."""
    found = []
    for tokens in study.budgets:
        if tokens >= FROM:
            found.append(_leads(study, tokens))
    found.append(_apart(study))
    for factor in (1, 2):
        found.append(_ahead(study, factor))
    found.append(_half_the_tokens(study))
    found.append(_ahead_of_the_paper(study))
    found.append(_accuracy(study))
    return found


def main_bars(study: Study) -> list[Bar]:
    """Those of the main budget that are about perplexity: what another model may be asked too."""
    return [_leads(study, study.main), _apart(study), _ahead(study, 1), _ahead_of_the_paper(study)]


def counted(found: Sequence[Bar]) -> str:
    """How many are met, not met, not measured; and of how many that is said with seeds or rows still out."""
    met, missed = (sum(bar.verdict.startswith(verdict) for bar in found) for verdict in (MET, NOT_MET))
    text = f"{met} are met, {missed} not met, {len(found) - met - missed} not measured"
    partly = sum(bar.verdict.endswith(SO_FAR) for bar in found)
    return f"{text} ({partly} of them so far: seeds or rows are still out)" if partly else text


def _leads(study: Study, tokens: int) -> Bar:
    ours, rivals = study.at(tokens)
    matches = [match(ours, rival, metric) for rival in rivals for _, metric in study.texts]
    known = [one for one in matches if one is not None]
    lost = [one for one in known if one.difference >= 0]
    if not lost and known:
        said = f"below every rival with results ({len({one.other.row for one in known})}); nearest: {_nearest(known)}"
    else:
        said = "; ".join(f"{one.other.label} on {_text(one)}: {signed(one)}" for one in lost)
    asked = f"{millions(tokens)} tokens: lower perplexity than every other 2:4 method, on every text"
    planned = len(matches) + len(study.lacking(tokens))
    return Bar(asked, said or "no results", _verdict(not lost, known, planned))


def _apart(study: Study) -> Bar:
    ours = study.ours
    matches = [match(ours, rival, metric) for rival in study.rivals for _, metric in study.texts]
    asked = f"{millions(study.main)} tokens: 95 % intervals over seeds apart from those of every other 2:4 method"
    known = [one for one in matches if one is not None]
    if known and not any(_has_interval(one) for one in known):
        return Bar(asked, "one seed of ours: there is no interval over seeds yet", OPEN)
    touching = [one for one in known if not _is_below(one)]
    said = "; ".join(
        f"{one.other.label} on {_text(one)}: {number(one.row.estimate(one.metric))} and "
        f"{number(one.other.estimate(one.metric))} (paired: {signed(one)}{_p(one)})"
        for one in touching
    )
    rivals = {one.other.row for one in known}
    said = said or (f"apart from every rival with results ({len(rivals)}); nearest: {_nearest(known)}" if known else "")
    return Bar(asked, said or "no results", _verdict(not touching, known, len(matches)))


def _has_interval(one: Match) -> bool:
    ours = one.row.estimate(one.metric)
    return ours is not None and ours.half is not None


def _is_below(one: Match) -> bool:
    """Whether our interval lies below the rival's; a rival with one seed has only its mean, ours needs several."""
    ours, theirs = one.row.estimate(one.metric), one.other.estimate(one.metric)
    if ours is None or theirs is None or ours.half is None:
        return False
    return ours.mean + ours.half < theirs.mean - (theirs.half or 0.0)


def _ahead(study: Study, factor: int) -> Bar:
    tokens = study.near(study.main * factor)
    asked = f"{millions(study.main * factor)} tokens: at least {AHEAD:.0%} below the best rival's perplexity"
    ours, rivals = study.at(tokens) if tokens else (None, [])
    whole = not (tokens and study.lacking(tokens))
    return _by(asked, study, ours, lambda metric: best(rivals, metric), AHEAD, rivals, whole=whole)


def _half_the_tokens(study: Study) -> Bar:
    few, many = study.near(2 * study.main), study.near(4 * study.main)
    budgets = f"ours at {millions(2 * study.main)} no worse than the best rival at {millions(4 * study.main)}"
    asked = f"half the tokens: {budgets}"
    ours = study.at(few)[0] if few else None
    rivals = study.at(many)[1] if many else []
    whole = not (many and study.lacking(many))
    return _by(asked, study, ours, lambda metric: best(rivals, metric), 0.0, rivals, whole=whole)


def _ahead_of_the_paper(study: Study) -> Bar:
    asked = f"{millions(study.main)} tokens: at least {AHEAD_OF_PAPER:.0%} below the paper's own preset"
    paper = study.table_2.row(PAPER)
    return _by(asked, study, study.ours, lambda _: paper, AHEAD_OF_PAPER, [paper] if paper else [])


def _by(
    asked: str,
    study: Study,
    ours: ExhibitRow | None,
    rival: Callable[[str], ExhibitRow | None],
    least: float,
    rows: list[ExhibitRow],
    *,
    whole: bool = True,
) -> Bar:
    """Ours at least so far below the rival that `rival` finds among `rows`; not `whole`: some are not planned there."""
    matches = [match(ours, rival(metric), metric) for _, metric in study.texts]
    known = [one for one in matches if one is not None]
    said = "; ".join(f"{_text(one)}: {signed(one)} against {one.other.label}" for one in known)
    enough = all(one.difference <= -least for one in known)
    whole = whole and all(is_whole(row, metric) for row in rows for _, metric in study.texts)
    return Bar(asked, said or "no results", _verdict(enough, known, len(matches) if whole else len(matches) + 1))


def _accuracy(study: Study) -> Bar:
    asked = f"{millions(study.main)} tokens: mean zero-shot accuracy within the interval of the best rival, or above"
    rival, dense = best(study.rivals, MEAN), study.table_2.row(DENSE)
    found, against = match(study.ours, rival, MEAN), match(study.ours, dense, MEAN)
    if found is None:
        return Bar(asked, "no results", OPEN)
    theirs = found.other.estimate(MEAN)
    ours = found.row.estimate(MEAN)
    assert ours is not None
    assert theirs is not None  # a match has both
    said = f"{number(ours, percent=True)}, {found.other.label} {number(theirs, percent=True)}"
    if against is not None:
        p = "" if against.p is None else f", p {against.p:.2g}"
        said += f"; against the dense model {signed(against)}{p}"
    enough = ours.mean >= theirs.mean - (theirs.half or 0.0)
    whole = all(is_whole(row, MEAN) for row in study.rivals)
    return Bar(asked, said, _verdict(enough, [found], 1 if whole and against is not None else 2))


def _nearest(known: Iterable[Match]) -> str:
    """The rival that comes closest on each text, with both numbers' difference."""
    closest: dict[str, Match] = {}
    for one in known:
        text = _text(one)
        if text not in closest or one.difference > closest[text].difference:
            closest[text] = one
    return "; ".join(f"{one.other.label} on {text}, {signed(one)}" for text, one in closest.items())


def _p(one: Match) -> str:
    return "" if one.p is None else f", p {one.p:.2g}"


def _text(one: Match) -> str:
    return one.metric.partition(":")[0]


def _verdict(enough: bool, known: Iterable[Match], planned: int) -> str:
    """MET only if there is something and all of it is enough; one that is whole is said without ' so far'."""
    known = list(known)
    if not known:
        return OPEN
    whole = len(known) >= planned and all(one.whole for one in known)
    return (MET if enough else NOT_MET) + ("" if whole else SO_FAR)
