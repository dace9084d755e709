"""Measuring a model under any suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparseforge_core.data.corpora import Corpus
from sparseforge_core.errors import RecipeError
from sparseforge_core.evaluate.perplexity import perplexity
from sparseforge_core.evaluate.result import SuiteResult
from sparseforge_core.evaluate.suites import HarnessSuite, PerplexitySuite, Suite, ThroughputSuite
from sparseforge_core.evaluate.throughput import throughput


def evaluate_model(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    *,
    corpus: Corpus,
    home: Path,
    items_dir: Path,
    device: torch.device,
    batch_size: int,
    sparse: Sequence[tuple[int, float]],
) -> SuiteResult:
    """Run `suite` on `model`; `sparse` is (parameters, density) of each of its masked weights.

    Raises DataError if its data cannot be had or does not fit the model.
    """
    if isinstance(suite, HarnessSuite):
        # lm-eval is imported only when it is used: perplexity must work on machines without it.
        from sparseforge_core.evaluate.harness import zero_shot

        return zero_shot(model, tokenizer, suite, items_dir=items_dir, device=device, batch_size=batch_size)
    if isinstance(suite, PerplexitySuite):
        return perplexity(model, tokenizer, suite, corpus=corpus, home=home, device=device, batch_size=batch_size)
    if isinstance(suite, ThroughputSuite):
        return throughput(model, suite, device=device, sparse=sparse)
    raise RecipeError(f"no rule to measure a {type(suite).__name__}")
