"""Perplexity with everything that defines it stated: text, window, stride, what is predicted."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from sparseforge_core.data.corpora import Corpus
from sparseforge_core.data.textfiles import read_documents
from sparseforge_core.data.tokens import tokenize_once
from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.answers import remembered
from sparseforge_core.evaluate.precision import dtype_of
from sparseforge_core.evaluate.result import SuiteResult, measurement
from sparseforge_core.evaluate.subject import Subject
from sparseforge_core.evaluate.suites import WIKITEXT_ENV, PerplexitySuite

WIKITEXT_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1")

C4_HUB = "allenai/c4"
NOTHING = -100
"""In the place of a token that is not predicted."""

C4_FILE = "en/c4-validation.00000-of-00008.json.gz"
C4_ENV = "SPARSEFORGE_C4"
"""The environment variable that names a local JSON-lines file of C4 validation documents, compressed or not."""
C4_DOCUMENTS = 1100
"""Documents of the validation split that are joined, as SparseGPT and Wanda do."""


def perplexity(subject: Subject, suite: PerplexitySuite) -> SuiteResult:
    """`perplexity` and `nll` (nats per predicted token) of the suite's text.

    The standard error is that of the mean over windows; for the perplexity by the delta method. Raises DataError
    if the window exceeds the model's positions or the text is shorter than one window.
    """
    check_window(subject.model, suite.name, suite.window)
    ids, about = _text(subject.tokenizer, suite, subject.corpus, subject.home)
    table = cut_windows(ids, suite.name, suite.window, suite.limit)
    windows = len(table)

    def run(left: list[int]) -> Iterator[dict[int, Any]]:
        for places in torch.tensor(left, dtype=torch.long).split(subject.batch_size):
            found = window_losses(subject.model, table[places].to(subject.device))
            yield {place: [_finite(loss)] for place, loss in zip(places.tolist(), found.tolist(), strict=True)}

    known = by_window(subject, f"perplexity-{suite.text}", about["sha256"], table, run)
    losses = torch.tensor([math.nan if loss is None else loss for (loss,) in known], dtype=torch.float64)
    mean = float(losses.mean())
    error = float(losses.std()) / math.sqrt(windows) if windows > 1 else None
    predicted = windows * (suite.window - 1)
    about |= {"window": suite.window, "stride": suite.window, "bos": False, "windows": windows, "predicted": predicted}
    value = math.exp(mean) if mean < 700 else math.inf
    rows = (
        measurement("perplexity", value, None if error is None else value * error, predicted, about),
        measurement("nll", mean, error, predicted, about),
    )
    items = tuple({"window": i, "nll": _finite(loss)} for i, loss in enumerate(losses.tolist()))
    return SuiteResult(rows, items, {"batch_size": subject.batch_size, "dtype": dtype_of(subject.model)})


def by_window(
    subject: Subject, name: str, text: str, table: torch.Tensor, run: Callable[[list[int]], Iterator[dict[int, Any]]]
) -> list[Any]:
    """What `run` gives for each window of `table`, kept in the cell's folder so that an interrupted pass goes on.

    `text` is the hash of what the windows are cut from: each text has a file of its own.
    """
    about = {"task": name, "text": text, "window": table.shape[1]}
    about |= {"model": subject.identity, "dtype": dtype_of(subject.model)}
    asked = [hashlib.sha256(window.numpy().tobytes()).hexdigest()[:12] for window in table]
    return remembered(subject.items_dir, name, about, asked, run)


def check_window(model: Any, name: str, window: int) -> None:
    """Raise DataError if the model accepts fewer than `window` tokens."""
    positions = getattr(model.config, "max_position_embeddings", None) or model.config.n_positions
    if window > positions:
        raise DataError(f"suite {name}: window={window}, and the model accepts at most {positions} tokens")


def cut_windows(ids: Any, name: str, window: int, limit: int | None) -> torch.Tensor:
    """Non-overlapping windows `[windows, window]`, the first `limit`. Raises DataError if the text is too short."""
    windows = len(ids) // window if limit is None else min(len(ids) // window, limit)
    if windows == 0:
        raise DataError(f"suite {name}: the text has {len(ids)} tokens, fewer than one window of {window}")
    return torch.from_numpy(np.array(ids[: windows * window], dtype=np.int64)).view(windows, window)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@torch.no_grad()
def window_losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each window of `[windows, length]`, over its `length - 1` predictions."""
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    wanted = F.pad(tokens[:, 1:], (0, 1), value=NOTHING)  # the last position has none, and so no logit is copied
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=NOTHING, reduction="none")
    return losses.view_as(tokens)[:, :-1].mean(1).cpu()


def _text(tokenizer: Any, suite: PerplexitySuite, corpus: Corpus, home: Path) -> tuple[Any, dict[str, Any]]:
    if suite.text == "heldout":
        tokens = tokenize_once(corpus, "heldout", tokenizer, home)
        return tokens.ids, {"text": "held-out split of the recipe's corpus", "sha256": tokens.sha256}
    if suite.corpus is not None:
        _check_unseen(suite, corpus)
        tokens = tokenize_once(suite.corpus, "all", tokenizer, home)
        return tokens.ids, {"text": f"the suite's own {suite.corpus.kind} corpus", "sha256": tokens.sha256}
    if suite.text == "c4":
        text = c4_validation()
        about = {"text": f"C4 validation, first {C4_DOCUMENTS} documents", "join": "one space"}
    else:
        text = wikitext2_test()
        about = {"text": "WikiText-2 raw test", "join": "blank line"}
    about["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, about


def _check_unseen(suite: PerplexitySuite, corpus: Corpus) -> None:
    """Raise DataError if the suite's own text is, or shares a file with, what the recipe trains on."""
    shared = {*getattr(suite.corpus, "sha256", ())} & {*getattr(corpus, "sha256", ())}
    if shared or suite.corpus == corpus:
        what = f"{len(shared)} files" if shared else "all of it"
        raise DataError(
            f"suite {suite.name}: corpus shares {what} with the text that the recipe trains on; measure on other text, "
            "or on its held-out documents with text='heldout'"
        )


def wikitext2_test() -> str:
    """The raw WikiText-2 test set, rows joined by blank lines as the GPTQ and Wanda papers read it.

    From the folder in $SPARSEFORGE_WIKITEXT2 (with wiki.test.raw), else from the hub. Raises DataError saying how
    to provide it.
    """
    folder = os.environ.get(WIKITEXT_ENV)
    if folder:
        path = Path(folder) / "wiki.test.raw"
        if not path.is_file():
            raise DataError(f"{WIKITEXT_ENV}={folder}: there is no wiki.test.raw in it")
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return "\n\n".join((line + "\n") if line.strip() else "" for line in lines)
    import datasets

    try:
        rows = datasets.load_dataset(*WIKITEXT_HUB, split="test")
    except (OSError, ValueError) as error:
        raise DataError(
            f"WikiText-2 is not at hand: the hub cannot be reached. Set {WIKITEXT_ENV} to a folder with wiki.test.raw"
        ) from error
    return "\n\n".join(rows["text"])


def c4_validation() -> str:
    """The first 1,100 documents of C4's English validation split, joined by one space.

    From the JSON-lines file in $SPARSEFORGE_C4 (a row a document, its text under "text"), else from the hub. Raises
    DataError saying how to provide it.
    """
    named = os.environ.get(C4_ENV)
    if named:
        documents = itertools.islice(read_documents(Path(named), field="text", separator=None), C4_DOCUMENTS)
        return " ".join(documents)
    import datasets

    try:
        rows = datasets.load_dataset(C4_HUB, data_files={"validation": C4_FILE}, split="validation", streaming=True)
        return " ".join(str(row["text"]) for row in rows.take(C4_DOCUMENTS))
    except (OSError, ValueError) as error:
        raise DataError(
            f"C4 validation text is not at hand: the hub cannot be reached. Set {C4_ENV} to a JSON-lines file of its "
            f"documents, such as {C4_FILE} of {C4_HUB}"
        ) from error
