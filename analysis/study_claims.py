"""What the paper claims, and whether it holds in small: each claim as a comparison of two rows, decided by a test."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.accuracy_tables import MEAN
from analysis.frames import ExhibitRow
from analysis.significance import LEVEL
from analysis.study_data import CONTROL, DENSE, FULL, OURS, PAPER, Match, Study, best, match, millions, signed

HOLDS, FAILS, UNDECIDED, OPEN = "holds", "does not hold", "undecided", "not measured"


@dataclass(frozen=True)
class Claim:
    """A claim in words, with the paper's own numbers, and what this study says to it."""

    claim: str
    found: str
    verdict: str


PRINTED = {
    "naive": "55.96 at 1.25 B tokens, naive retraining 54.73 at 10 B",
    "sr-ste": "55.96 at 1.25 B tokens, SR-STE 54.99 at 10 B",
    "cast": "55.96 at 1.25 B tokens, CAST 55.91 at 7.5 B",
    "maskllm": "55.96 at 1.25 B tokens, MaskLLM 52.09 at 2 B",
}
"""What the paper prints of mean accuracy, by the row of Table 2 here; AST has no mean there."""


def claims(study: Study) -> list[Claim]:
    """Each claim that a small study can speak to; the paper's numbers are of LLaMA-2-7B."""
    row, ablation = study.table_2.row, study.table_3.row
    paper, ours, full = row(PAPER), row(OURS), ablation(FULL)
    found = [_accurate(paper, row(name), printed) for name, printed in PRINTED.items()]
    found += [
        _claim(
            study,
            "A second-order score beats magnitude (Table 3: perplexity 6.38 against 6.53)",
            ablation("fisher"),
            ablation("magnitude"),
        ),
        _claim(study, "Annealing beats hard masks from the start", full, ablation("no-annealing")),
        _claim(study, "Distillation helps (Table 3: 6.38 against 6.66)", full, ablation("no-distillation")),
        _claim(study, "The side branch lowers perplexity (Table 3 itself: 6.38 against 6.36)", ablation("slorb"), full),
        _claim(study, "Twice the steps help (Table 3: 6.38 against 6.48)", full, ablation("half-steps")),
        _fewer_tokens(study),
        _claim(study, "Masks that move beat SparseGPT's frozen one, all else alike", full, ablation("frozen")),
        _claim(study, "Ours as a whole beats a frozen mask, distilled as usual", ours, row("frozen-sparsegpt")),
        _claim(study, "The sparse model reaches the untouched dense one", ours, row(DENSE)),
        _claim(study, "The sparse model reaches a dense one that had the same tokens", ours, row(CONTROL)),
    ]
    return found


def _accurate(paper: ExhibitRow | None, other: ExhibitRow | None, printed: str) -> Claim:
    """The method as printed against one rival, by accuracy: here at equal tokens."""
    found = match(paper, other, MEAN)
    claim = f"More accurate, here at equal tokens (Table 2: {printed})"
    return _decided(claim, [found] if found else [])


NOT_TESTED = (
    "Text of higher quality (Table 3: C4 to Dolmino, 6.38 to 6.10): the row with books alone says what modern prose "
    "adds to old books, which is another question.",
    "A larger teacher (Table 3: 13B, 6.38 to 6.61): no larger model with this tokenizer is at hand; the row with a "
    "retrained teacher is another question.",
    "Results across model families and sizes (Tables 1, 4 to 6), beyond the second model above, and decoding speed "
    "(Table 7): not part of this study.",
)
"""Claims that this study cannot speak to, and why."""


def _claim(study: Study, claim: str, better: ExhibitRow | None, worse: ExhibitRow | None) -> Claim:
    matches = [match(better, worse, metric) for _, metric in study.texts]
    return _decided(claim, [one for one in matches if one is not None])


def _fewer_tokens(study: Study) -> Claim:
    """Ours with half the tokens against the best rival: the figure's claim, at every budget that has both."""
    matches: list[Match] = []
    for tokens in study.budgets:
        few = study.near(tokens / 2)
        ours = study.at(few)[0] if few else None
        rivals = study.at(tokens)[1]
        found = [match(ours, best(rivals, metric), metric) for _, metric in study.texts]
        matches += [one for one in found if one is not None]
    return _decided("Half the tokens of the best rival are enough (Table 2 has a sixth: 1.25 B against 7.5 B)", matches)


def _decided(claim: str, matches: list[Match]) -> Claim:
    if not matches:
        return Claim(claim, "rows absent", OPEN)
    said = "; ".join(_sentence(one) for one in matches)
    if all(one.better > 0 and _is_shown(one) for one in matches):
        verdict = HOLDS
    elif all(one.better < 0 and _is_shown(one) for one in matches):
        verdict = FAILS
    else:
        verdict = UNDECIDED
    return Claim(claim, said, verdict + ("" if all(one.whole for one in matches) else " so far"))


def _is_shown(one: Match) -> bool:
    return one.p is not None and one.p <= LEVEL


def _sentence(one: Match) -> str:
    p = "" if one.p is None else f", p {one.p:.2g}"
    text = one.metric.partition(":")[0] if one.relative else "accuracy"
    budgets = ""
    if one.row.tokens != one.other.tokens and one.other.tokens and one.row.tokens:
        budgets = f" ({millions(one.row.tokens)} against {millions(one.other.tokens)} of {one.other.label})"
    return f"{text}{budgets}: {signed(one)}{p}"
