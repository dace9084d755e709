"""Whether benchmark items occur in the text that a model was retrained on: a 13-gram scan, made once and kept.

Texts are compared as lower-case alphanumeric words. An item is *contaminated* if 13 words in a row of one of its texts
occur in a training document: of the question followed by any of its choices, or of a passage. A text of 8 to 12 words
counts if it occurs as a whole; an item whose every text is shorter cannot be told from chance and is reported apart as
too short. The corpus is read once for all tasks; the finding is kept in HOME/contamination/ under a hash of the
corpus, the items and n, so that a grid scans once.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseforge_core import files, specs
from sparseforge_core.data.cache import content_key
from sparseforge_core.data.corpora import Corpus
from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.ngrams import Wanted
from sparseforge_core.evaluate.result import measurement

log = logging.getLogger(__name__)

NGRAM = 13
"""Words in a row that give an item away, as GPT-3's and lm-eval's decontamination have it."""

SHORTEST = 8
"""Words of the shortest text that is looked for as a whole."""

SHOWN = 100
"""Contaminated items named in a measurement; the kept finding names all, with the words that gave them away."""


class CorpusUnreadable(DataError):
    """The corpus that a model was retrained on is not at hand any more."""


def contaminated(
    corpus: Corpus, home: Path, tasks: dict[str, list[list[str]]], *, n: int = NGRAM
) -> tuple[dict[str, Any], ...]:
    """`<task>/contaminated`, the share of a task's items that occur in the corpus, for each task.

    `tasks` holds the texts of every item. The detail counts the items, names them by document number, and says how
    much text was read. Raises CorpusUnreadable if the corpus cannot be read, DataError if n is below 2.
    """
    if n < 2:
        raise DataError(f"a scan for {n}-grams finds everything; use 13, or 2 at least")
    return tuple(_row(task, found) for task, found in findings(corpus, home, tasks, n=n).items())


def findings(
    corpus: Corpus, home: Path, tasks: dict[str, list[list[str]]], *, n: int = NGRAM
) -> dict[str, dict[str, Any]]:
    """What the scan found of each task, read from HOME or made by one pass over the corpus's training split."""
    about = {"corpus": specs.encode(corpus), "identity": corpus.identity(), "split": "train", "n": n, "format": 1}
    folder = home / "contamination" / content_key({**about, "shortest": SHORTEST})
    paths = {task: folder / f"{task}-{content_key({'items': items})}.json" for task, items in tasks.items()}
    known = {task: _read(path) for task, path in paths.items()}
    if None in known.values():
        with files.only_one(folder):  # one process reads the corpus while others wait for what it finds
            missing = [task for task, path in paths.items() if _read(path) is None]
            for task, found in _scan(corpus, home, {task: tasks[task] for task in missing}, n).items():
                files.write_json(paths[task], {"found": found, "check": content_key(found), "about": about})
            known = {task: _read(path) for task, path in paths.items()}
    return {task: found for task, found in known.items() if found is not None}


def _scan(corpus: Corpus, home: Path, tasks: dict[str, list[list[str]]], n: int) -> dict[str, dict[str, Any]]:
    if not tasks:
        return {}
    began = time.monotonic()
    items = [texts for task in tasks for texts in tasks[task]]
    wanted = Wanted(items, n=n, shortest=min(SHORTEST, n))
    try:
        counted = wanted.find(corpus.documents("train", home))
    except DataError as error:
        raise CorpusUnreadable(str(error)) from error
    log.info(
        "looked for %d items in %d documents (%.1f million words) in %.0f s: %d occur",
        len(items), counted.documents, counted.words / 1e6, time.monotonic() - began, len(counted.found),
    )  # fmt: skip
    result, first = {}, 0
    for task, own in tasks.items():
        last = first + len(own)
        result[task] = {
            "items": len(own),
            "contaminated": {str(i - first): counted.found[i] for i in range(first, last) if i in counted.found},
            "too_short": [i - first for i in wanted.too_short if first <= i < last],
            "ngram": n,
            "documents": counted.documents,
            "words": counted.words,
        }
        first = last
    return result


def _read(path: Path) -> dict[str, Any] | None:
    """A kept finding, or None if there is none; a damaged one is reported and made anew."""
    if not path.is_file():
        return None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, Any] = body["found"]
        if content_key(found) != body["check"]:
            raise ValueError("its checksum differs")
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); the corpus is scanned again", path, error)
        return None
    return found


def _row(task: str, found: dict[str, Any]) -> dict[str, Any]:
    numbers = sorted(int(number) for number in found["contaminated"])
    detail = {
        "ngram": found["ngram"],
        "contaminated": len(numbers),
        "doc_ids": numbers[:SHOWN],
        "too_short": len(found["too_short"]),
        "documents": found["documents"],
        "words": found["words"],
        "scanned": "training split of the recipe's corpus",
    }
    return measurement(f"{task}/contaminated", len(numbers) / found["items"], None, found["items"], detail)


def item_texts(task: str, document: dict[str, Any]) -> list[str]:
    """The texts of an item by which it would be recognised in a corpus, none of the prompt's own words among them.

    Raises DataError for a task without a rule.
    """
    if task not in TEXTS:
        raise DataError(f"task {task}: no rule says which of its columns are the item's text; add one to TEXTS")
    texts: Sequence[str] = TEXTS[task](document)
    return list(texts)


def _after(question: str, choices: Sequence[str]) -> list[str]:
    return [f"{question} {choice}" for choice in choices]


TEXTS: dict[str, Any] = {
    "arc_challenge": lambda doc: _after(doc["question"], doc["choices"]["text"]),
    "arc_easy": lambda doc: _after(doc["question"], doc["choices"]["text"]),
    "boolq": lambda doc: [doc["passage"], doc["question"]],
    "gsm8k": lambda doc: [doc["question"], doc["answer"]],
    "hellaswag": lambda doc: _after(doc["query"], doc["choices"]),
    "lambada_openai": lambda doc: [doc["text"]],
    "openbookqa": lambda doc: _after(doc["question_stem"], doc["choices"]["text"]),
    "piqa": lambda doc: _after(doc["goal"], [doc["sol1"], doc["sol2"]]),
    "race": lambda doc: [doc["article"], str(doc["problems"])],
    "rte": lambda doc: [doc["sentence1"], doc["sentence2"]],
    "winogrande": lambda doc: [doc["sentence"].replace("_", option) for option in (doc["option1"], doc["option2"])],
}
"""Task -> its items' texts."""
