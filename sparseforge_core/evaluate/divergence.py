"""How far a model's predictions are from the dense model's, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparseforge_core.data.tokens import tokenize_once
from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.perplexity import by_window, check_window, cut_windows
from sparseforge_core.evaluate.precision import dtype_of
from sparseforge_core.evaluate.result import SuiteResult, mean_and_error, measurement
from sparseforge_core.evaluate.subject import Subject
from sparseforge_core.evaluate.suites import DivergenceSuite


def divergence(subject: Subject, suite: DivergenceSuite) -> SuiteResult:
    """`kl_to_dense` (nats per token) and `top1_agreement` (share of predictions whose likeliest token is the same).

    The standard error is that of the mean over windows. Raises DataError if the window exceeds the model, the text is
    too short, or the vocabularies differ.
    """
    check_window(subject.model, suite.name, suite.window)
    tokens = tokenize_once(subject.corpus, "heldout", subject.tokenizer, subject.home)
    table = cut_windows(tokens.ids, suite.name, suite.window, suite.limit)
    dense = subject.dense().model
    if dense.config.vocab_size != subject.model.config.vocab_size:
        raise DataError(
            f"suite {suite.name}: the dense model's vocabulary has {dense.config.vocab_size} entries, this model's "
            f"{subject.model.config.vocab_size}; they cannot be compared token by token"
        )

    def run(left: list[int]) -> Iterator[dict[int, Any]]:
        for places in torch.tensor(left, dtype=torch.long).split(subject.batch_size):
            kl, same = window_divergence(dense, subject.model, table[places].to(subject.device))
            yield {
                place: [a, b] if math.isfinite(a) else [None, None]
                for place, a, b in zip(places.tolist(), kl.tolist(), same.tolist(), strict=True)
            }

    known = by_window(subject, "kl-to-dense", tokens.sha256, table, run)
    items = [{"window": place, "kl": kl, "agree": same} for place, (kl, same) in enumerate(known)]
    predicted = len(table) * (suite.window - 1)
    about = {
        "text": "held-out split of the recipe's corpus",
        "sha256": tokens.sha256,
        "window": suite.window,
        "windows": len(table),
        "against": "the dense model that the recipe starts from",
        "direction": "KL(dense || model), temperature 1",
    }
    rows = (
        measurement("kl_to_dense", *mean_and_error([item["kl"] for item in items]), predicted, about),
        measurement("top1_agreement", *mean_and_error([item["agree"] for item in items]), predicted, about),
    )
    return SuiteResult(rows, tuple(items), {"batch_size": subject.batch_size, "dtype": dtype_of(subject.model)})


@torch.no_grad()
def window_divergence(dense: Any, model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL(dense || model) and share of equal argmax of each window of `[windows, length]`, float64 on the CPU.

    Over the `length - 1` predictions of tokens inside the window.
    """
    before = dense(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    after = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).double()
    same = (before.argmax(-1) == after.argmax(-1)).double()
    return kl.mean(1).cpu(), same.mean(1).cpu()
