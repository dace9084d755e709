"""Predicting the last word of held-out passages: LAMBADA's question where LAMBADA's data is not at hand."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Iterator
from typing import Any

from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.answers import digest, remembered
from sparseforge_core.evaluate.precision import dtype_of
from sparseforge_core.evaluate.result import SuiteResult, mean_and_error, measurement
from sparseforge_core.evaluate.scoring import Request, Scorer
from sparseforge_core.evaluate.subject import Subject
from sparseforge_core.evaluate.suites import LastWordSuite

LETTERS = 4
"""Of a word that may be asked for."""


def last_word(subject: Subject, suite: LastWordSuite) -> SuiteResult:
    """`last_word/acc`: whether greedy decoding gives the whole word; `last_word/perplexity` of the word, as LAMBADA.

    Raises DataError if the held-out text has no such passage, or the tokenizer no end-of-text token.
    """
    found = passages(subject.corpus.documents("heldout", subject.home), suite.words, suite.limit)
    if not found:
        raise DataError(
            f"suite {suite.name}: the held-out text has no passage of {suite.words} words that ends in a word of "
            f"{LETTERS} letters; use a longer corpus or a suite with fewer words"
        )
    positions = getattr(subject.model.config, "max_position_embeddings", None) or subject.model.config.n_positions
    scorer = Scorer(subject.model, batch_size=subject.batch_size, max_length=positions)
    requests = _requests(subject.tokenizer, found)

    def run(left: list[int]) -> Iterator[dict[int, Any]]:
        for batch in scorer.score([requests[place] for place in left]):
            yield {
                left[index]: [value, greedy] if math.isfinite(value) else [None, None]
                for index, (value, greedy) in batch.items()
            }

    kept = {"task": "last-word", "model": subject.identity, "dtype": dtype_of(subject.model)}
    asked = [digest([request.context, request.continuation]) for request in requests]
    known = remembered(subject.items_dir, "last-word", kept, asked, run)
    items: list[dict[str, Any]] = [
        {
            "passage": place,
            "word": word.strip(),
            "acc": None if greedy is None else float(greedy),
            "loglikelihood": value,
        }
        for place, ((_, word), (value, greedy)) in enumerate(zip(found, known, strict=True))
    ]
    about = {
        "text": "held-out split of the recipe's corpus; LAMBADA's question, not its data",
        "words": suite.words,
        "letters": LETTERS,
        "limit": suite.limit,
        "truncated": sum(len(r.context) + len(r.continuation) > positions + 1 for r in requests),
    }
    likelihood, error = mean_and_error([item["loglikelihood"] for item in items])
    surprise = None if likelihood is None else math.exp(min(-likelihood, 700.0))
    spread = None if surprise is None or error is None else surprise * error
    rows = (
        measurement("last_word/acc", *mean_and_error([item["acc"] for item in items]), len(items), about),
        measurement("last_word/perplexity", surprise, spread, len(items), about),
    )
    return SuiteResult(
        rows, tuple(items), {"batch_size": subject.batch_size, "dtype": dtype_of(subject.model), "window": positions}
    )


def passages(documents: Iterable[str], words: int, limit: int | None = None) -> list[tuple[str, str]]:
    """(passage without its last word, the word with a space before it) of consecutive pieces of the documents."""
    found: list[tuple[str, str]] = []
    for document in documents:
        for passage in _cut(document.split(), words):
            if limit is not None and len(found) == limit:
                return found
            found.append(passage)
    return found


def _cut(split: list[str], words: int) -> Iterator[tuple[str, str]]:
    for start in range(0, len(split) - words + 1, words):
        piece = split[start : start + words]
        # Back to a plain word; the passage keeps at least half its length.
        for end in range(len(piece), words // 2, -1):
            word = piece[end - 1].rstrip(string.punctuation)
            if len(word) >= LETTERS and word.isascii() and word.isalpha():
                yield " ".join(piece[: end - 1]), " " + word
                break


def _requests(tokenizer: Any, found: list[tuple[str, str]]) -> list[Request]:
    """Token ids as lm-eval splits a pair: those of the whole text after those of its context."""
    contexts = tokenizer([context for context, _ in found]).input_ids
    wholes = tokenizer([context + word for context, word in found]).input_ids
    return [
        Request(list(context), list(whole[len(context) :]), group=index)
        for index, (context, whole) in enumerate(zip(contexts, wholes, strict=True))
    ]
