"""Answers that changed against the dense model, item by item."""

from __future__ import annotations

from typing import Any

from sparseforge_core.evaluate.harness import answered
from sparseforge_core.evaluate.result import SuiteResult, mean_and_error, measurement
from sparseforge_core.evaluate.subject import Subject
from sparseforge_core.evaluate.suites import FlipSuite


def flips(subject: Subject, suite: FlipSuite) -> SuiteResult:
    """`<task>/flips`, the share of items answered otherwise than by the dense model, and `mean/flips` over tasks.

    The detail counts the answers lost (right before, wrong now) and gained. A task without choices, such as LAMBADA,
    counts items whose correctness changed.
    """
    now, context = answered(subject, suite.tasks, suite.limit)
    before, _ = answered(subject.dense(), suite.tasks, suite.limit)
    items = [compared(new, old) for new, old in zip(now, before, strict=True)]
    rows, means = [], []
    for task in suite.tasks:
        own = [item for item in items if item["task"] == task]
        share, error = mean_and_error([item["flipped"] for item in own])
        about = {
            "task_version": own[0]["task_version"],
            "split": own[0]["split"],
            "limit": suite.limit,
            "against": "the dense model that the recipe starts from",
            "lost": sum(item["dense_acc"] == 1 and item["acc"] == 0 for item in own),
            "gained": sum(item["dense_acc"] == 0 and item["acc"] == 1 for item in own),
        }
        rows.append(measurement(f"{task}/flips", share, error, len(own), about))
        means.append(share)
    overall, _ = mean_and_error(means)
    rows.append(measurement("mean/flips", overall, None, len(items), {"tasks": list(suite.tasks)}))
    return SuiteResult(tuple(rows), tuple(items), context)


def compared(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """One item under both models; `flipped` is None where either has no answer (it diverged)."""
    what = "chosen" if "chosen" in now else "acc"
    known = now.get(what) is not None and before.get(what) is not None
    return {
        "task": now["task"],
        "task_version": now["task_version"],
        "split": now["split"],
        "doc_id": now["doc_id"],
        "doc_hash": now["doc_hash"],
        "chosen": now.get("chosen"),
        "dense_chosen": before.get("chosen"),
        "acc": now.get("acc"),
        "dense_acc": before.get("acc"),
        "flipped": float(now[what] != before[what]) if known else None,
    }
