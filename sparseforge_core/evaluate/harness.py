"""lm-eval's stock tasks on our scheduler, item by item. The main door to lm_eval.

lm-eval builds the requests and judges the responses; what lies between them is `PackedLM`. Answers are kept item by
item inside the cell's own folder: a second suite that shares tasks with a first reads them, and an interrupted
evaluation goes on with the items left. lm-eval's own cache is keyed by the request alone and would hand one model's
answers to another; it is never used.
"""

from __future__ import annotations

import math
import os
from typing import Any

import lm_eval
from lm_eval.evaluator import evaluate

from sparseforge_core import files
from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.answers import Answers, file_name
from sparseforge_core.evaluate.packed_lm import PackedLM
from sparseforge_core.evaluate.precision import dtype_of
from sparseforge_core.evaluate.result import SuiteResult, mean_and_error, measurement
from sparseforge_core.evaluate.stock_tasks import StockTask, stock_task, templates_compiled_once
from sparseforge_core.evaluate.subject import Subject
from sparseforge_core.evaluate.suites import HarnessSuite

VERSION = lm_eval.__version__

METRICS = ("acc", "acc_norm", "perplexity", "exact_match")
"""What the stock tasks of our suites measure of an item, in the order of a table."""


def zero_shot(subject: Subject, suite: HarnessSuite) -> SuiteResult:
    """Every metric of each task of the suite, and the unweighted mean of acc.

    Raises DataError naming a task whose items cannot be had.
    """
    items, context = answered(subject, suite.tasks, suite.limit)
    return SuiteResult(measurements=tuple(_summaries(suite, items)), items=tuple(items), context=context)


def answered(
    subject: Subject, tasks: tuple[str, ...], limit: int | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One record per item of the tasks, and the circumstances; what was answered before is not run again.

    Raises DataError naming a task whose items cannot be had, and for a tokenizer without an end-of-text token.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    dtype = dtype_of(subject.model)
    lm = PackedLM(subject.model, subject.tokenizer, device=subject.device, batch_size=subject.batch_size)
    records: list[dict[str, Any]] = []
    for name in tasks:
        opened = stock_task(name, limit)
        about = {
            "task": name,
            "task_version": opened.version,
            "items": f"{opened.split} of {opened.source}",
            "harness": VERSION,
            "model": subject.identity,
            "dtype": dtype,
        }
        path = subject.items_dir / file_name(name, about)
        with files.only_one(path):  # two suites of one cell may ask for the same task at once
            lm.answers = Answers(path, about)
            try:
                records += run_task(lm, opened, limit)
            finally:
                lm.answers.close()
    context = {
        "harness_version": VERSION,
        "batch_size": subject.batch_size,
        "dtype": dtype,
        "window": lm.max_length,
        "truncated_requests": lm.scorer.truncated,
        "scheduler": "choices share their context" if lm.scorer.packed else "one row a request",
    }
    return records, context


def run_task(lm: PackedLM, opened: StockTask, limit: int | None) -> list[dict[str, Any]]:
    """One record per item, from lm-eval's own evaluation of the task."""
    with templates_compiled_once():
        results: Any = evaluate(
            lm=lm,
            task_dict={"tasks": {opened.name: opened.task}, "groups": {}},
            limit=limit,
            bootstrap_iters=0,  # standard errors are ours, from the items
            log_samples=True,
        )
    if results is None:
        raise DataError(f"task {opened.name}: lm-eval returned nothing")
    kind = opened.task.OUTPUT_TYPE
    return [_record(opened, kind, sample) for sample in results["samples"][opened.name]]


def _record(opened: StockTask, kind: str, sample: dict[str, Any]) -> dict[str, Any]:
    record = {
        "task": opened.name,
        "task_version": opened.version,
        "split": opened.split,
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "target": str(sample["target"]),
    }
    responses = [response[0] for response in sample["resps"]]
    finite = True
    if kind == "generate_until":
        # Generation tasks are judged once for each way of reading the answer out of the text.
        record |= {"filter": sample["filter"], "text": responses[0]}
    else:
        likelihoods = [float(value) for value, _ in responses]
        finite = all(math.isfinite(value) for value in likelihoods)
        record["loglikelihoods"] = likelihoods if finite else None
        if kind == "multiple_choice":
            best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
            record["chosen"] = best if finite else None
    for metric in METRICS:
        if metric in sample:
            record[metric] = float(sample[metric]) if finite else None
    return record


def _summaries(suite: HarnessSuite, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows, means, variances, count = [], [], [], 0
    for task in suite.tasks:
        own = [item for item in items if item["task"] == task]
        about = {"task_version": own[0]["task_version"], "split": own[0]["split"], "limit": suite.limit}
        for name, metric, values in _columns(own):
            mean, error = mean_and_error(values)
            if metric == "perplexity":  # of the answers: exp of minus the mean log-likelihood, as lm-eval defines it
                mean = None if mean is None else math.exp(min(-mean, 700.0))
                error = None if mean is None or error is None else mean * error
            rows.append(measurement(f"{task}/{name}", mean, error, len(values), about))
            if metric == "acc":
                means.append(mean)
                variances.append(None if error is None else error**2)
                count += len(values)
    if not means:
        return rows
    known = [value for value in means if value is not None]
    overall = sum(known) / len(means) if len(known) == len(means) else None
    spread = [value for value in variances if value is not None]
    error = math.sqrt(sum(spread)) / len(means) if len(spread) == len(means) else None
    rows.append(measurement("mean/acc", overall, error, count, {"tasks": list(suite.tasks), "limit": suite.limit}))
    return rows


def _columns(items: list[dict[str, Any]]) -> list[tuple[str, str, list[float | None]]]:
    """(name, metric, values) of a task; one name for each filter where there are several."""
    found = []
    for metric in METRICS:
        for chosen in dict.fromkeys(item.get("filter") for item in items if metric in item):
            values = [item[metric] for item in items if item.get("filter") == chosen]
            found.append((metric if chosen is None else f"{metric},{chosen}", metric, values))
    return found
