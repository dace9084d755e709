"""Measuring a model under any suite."""

from __future__ import annotations

import logging
from typing import Any

from sparseforge_core.errors import RecipeError
from sparseforge_core.evaluate.contamination import NGRAM, CorpusUnreadable, contaminated, item_texts
from sparseforge_core.evaluate.divergence import divergence
from sparseforge_core.evaluate.last_word import last_word
from sparseforge_core.evaluate.perplexity import perplexity
from sparseforge_core.evaluate.result import SuiteResult
from sparseforge_core.evaluate.subject import Subject
from sparseforge_core.evaluate.suites import (
    BatchAgreementSuite,
    CalibrationSuite,
    DivergenceSuite,
    FlipSuite,
    HarnessSuite,
    LastWordSuite,
    PerplexitySuite,
    Suite,
    ThroughputSuite,
)
from sparseforge_core.evaluate.throughput import throughput

log = logging.getLogger(__name__)


def evaluate_model(subject: Subject, suite: Suite, *, ngram: int | None = NGRAM) -> SuiteResult:
    """Run `suite` on a model. Raises DataError if its data cannot be had or does not fit the model.

    Tasks measured on a model that was retrained come with a scan of its corpus for their items, by `ngram` words in a
    row; None leaves it out.
    """
    if isinstance(suite, HarnessSuite):
        return _harness(subject, suite, ngram)
    if isinstance(suite, (FlipSuite, CalibrationSuite, BatchAgreementSuite)):
        return _of_answers(subject, suite)
    if isinstance(suite, PerplexitySuite):
        return perplexity(subject, suite)
    if isinstance(suite, DivergenceSuite):
        return divergence(subject, suite)
    if isinstance(suite, LastWordSuite):
        return last_word(subject, suite)
    if isinstance(suite, ThroughputSuite):
        return throughput(subject.model, suite, device=subject.device, sparse=subject.sparse)
    raise RecipeError(f"no rule to measure a {type(suite).__name__}")


def _harness(subject: Subject, suite: HarnessSuite, ngram: int | None) -> SuiteResult:
    # lm-eval is imported only when it is used: perplexity must work on machines without it.
    from sparseforge_core.evaluate.harness import zero_shot
    from sparseforge_core.evaluate.stock_tasks import stock_task

    result = zero_shot(subject, suite)
    found: tuple[dict[str, Any], ...] = ()
    if not subject.retrained:
        scan = "nothing to scan: the weights were not trained on the corpus"
    elif ngram is None:
        scan = "not scanned: it was not asked for"
    else:
        tasks = {task: stock_task(task, suite.limit).documents(suite.limit) for task in suite.tasks}
        texts = {task: [item_texts(task, document) for document in documents] for task, documents in tasks.items()}
        scan = f"{ngram}-gram scan of the retraining corpus"
        try:
            found = contaminated(subject.corpus, subject.home, texts, n=ngram)
        except CorpusUnreadable as error:
            # The accuracies stand without the scan; that there is none is said here and stored beside them.
            scan = f"not scanned: {error}"
            log.warning("contamination of suite %s is unknown: %s", suite.name, error)
    return SuiteResult((*result.measurements, *found), result.items, {**result.context, "contamination": scan})


def _of_answers(subject: Subject, suite: FlipSuite | CalibrationSuite | BatchAgreementSuite) -> SuiteResult:
    """Suites over the items' answers, whatever the right ones."""
    from sparseforge_core.evaluate.agreement import batch_agreement
    from sparseforge_core.evaluate.calibration_error import calibration
    from sparseforge_core.evaluate.flips import flips

    if isinstance(suite, FlipSuite):
        return flips(subject, suite)
    if isinstance(suite, CalibrationSuite):
        return calibration(subject, suite)
    return batch_agreement(subject, suite)
