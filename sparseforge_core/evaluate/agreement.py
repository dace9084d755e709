"""Whether the batch size changes a number: the same items at several batch sizes, nothing taken from a cache."""

from __future__ import annotations

from typing import Any

from sparseforge_core.evaluate.harness import VERSION, run_task
from sparseforge_core.evaluate.packed_lm import PackedLM
from sparseforge_core.evaluate.precision import dtype_of
from sparseforge_core.evaluate.result import SuiteResult, measurement
from sparseforge_core.evaluate.stock_tasks import stock_task
from sparseforge_core.evaluate.subject import Subject
from sparseforge_core.evaluate.suites import BatchAgreementSuite


def batch_agreement(subject: Subject, suite: BatchAgreementSuite) -> SuiteResult:
    """`largest_difference` of a log-likelihood in nats, and `answers_changed`, over all items and batch sizes."""
    runs = []
    for size in suite.batch_sizes:
        lm = PackedLM(subject.model, subject.tokenizer, device=subject.device, batch_size=size)
        runs.append(
            [record for task in suite.tasks for record in run_task(lm, stock_task(task, suite.limit), suite.limit)]
        )
    items = [_compared(records) for records in zip(*runs, strict=True)]
    dtype = dtype_of(subject.model)
    about = {"batch_sizes": list(suite.batch_sizes), "tasks": list(suite.tasks), "limit": suite.limit, "dtype": dtype}
    differences = [item["difference"] for item in items]
    largest = None if None in differences else max(differences)
    rows = (
        measurement("largest_difference", largest, None, len(items), about),
        measurement("answers_changed", float(sum(item["changed"] for item in items)), None, len(items), about),
    )
    return SuiteResult(rows, tuple(items), {"harness_version": VERSION, "dtype": dtype})


def _compared(records: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One item at all batch sizes; `difference` is None where a size gave no number."""
    first, *others = records
    values = [record["loglikelihoods"] for record in records]
    difference = None
    if all(value is not None for value in values):
        difference = max(abs(a - b) for other in values[1:] for a, b in zip(values[0], other, strict=True))
    judged = ("chosen", "acc", "acc_norm")
    changed = any(first.get(name) != other.get(name) for other in others for name in judged)
    return {"task": first["task"], "doc_id": first["doc_id"], "difference": difference, "changed": changed}
