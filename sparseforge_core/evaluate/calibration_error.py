"""Whether a model is as sure as it is right: expected calibration error over the choices of an item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.harness import answered
from sparseforge_core.evaluate.result import SuiteResult, mean_and_error, measurement
from sparseforge_core.evaluate.subject import Subject
from sparseforge_core.evaluate.suites import CalibrationSuite

RESAMPLES = 500
"""Bootstrap samples of the items behind a standard error."""


def calibration(subject: Subject, suite: CalibrationSuite) -> SuiteResult:
    """`<task>/ece` with its bins in the detail, and `mean/ece` over tasks.

    Raises DataError for a task whose items have no choices.
    """
    records, context = answered(subject, suite.tasks, suite.limit)
    items = [_confidence(record) for record in records]
    rows, means = [], []
    for task in suite.tasks:
        own = [item for item in items if item["task"] == task]
        about: dict[str, Any] = {
            "task_version": own[0]["task_version"],
            "split": own[0]["split"],
            "limit": suite.limit,
            "bins": suite.bins,
        }
        known = [(item["confidence"], item["acc"]) for item in own if item["confidence"] is not None]
        value = error = None
        if len(known) == len(own):
            value, table = expected_calibration_error(known, suite.bins)
            error = _spread(known, suite.bins)
            about["table"] = table
        rows.append(measurement(f"{task}/ece", value, error, len(own), about))
        means.append(value)
    overall, _ = mean_and_error(means)
    rows.append(measurement("mean/ece", overall, None, len(items), {"tasks": list(suite.tasks), "bins": suite.bins}))
    return SuiteResult(tuple(rows), tuple(items), context)


def expected_calibration_error(
    answers: Sequence[tuple[float, float]], bins: int
) -> tuple[float, list[dict[str, float]]]:
    """Sum over bins of (share of items) x |accuracy - mean confidence|, and the filled bins.

    `answers` are (confidence, 1 if right else 0); bins are [i / bins, (i + 1) / bins), the last closed.
    """
    sure, right = np.array(answers, dtype=np.float64).T
    place = np.minimum((sure * bins).astype(int), bins - 1)
    table = []
    for index in np.unique(place):
        inside = place == index
        about = {"from": index / bins, "n": int(inside.sum())}
        table.append({**about, "confidence": float(sure[inside].mean()), "acc": float(right[inside].mean())})
    return sum(row["n"] / len(sure) * abs(row["acc"] - row["confidence"]) for row in table), table


def _confidence(record: dict[str, Any]) -> dict[str, Any]:
    if "chosen" not in record:
        raise DataError(f"task {record['task']}: its items have no choices, so there is no probability to calibrate")
    values = record["loglikelihoods"]
    if values is not None:
        best = max(values)
        values = 1.0 / sum(math.exp(value - best) for value in values)  # softmax at its largest entry
    kept = ("task", "task_version", "split", "doc_id", "doc_hash", "chosen", "acc")
    return {**{name: record[name] for name in kept}, "confidence": values}


def _spread(answers: list[tuple[float, float]], bins: int) -> float | None:
    if len(answers) < 2:
        return None
    draw = np.random.default_rng(0)
    samples = draw.integers(len(answers), size=(RESAMPLES, len(answers)))
    found = [expected_calibration_error([answers[i] for i in sample], bins)[0] for sample in samples]
    return float(np.std(found, ddof=1))
