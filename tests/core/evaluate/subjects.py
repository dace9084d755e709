"""A tiny random model as the subject of a suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparseforge_core.data.corpora import Corpus, Synthetic
from sparseforge_core.evaluate.subject import Subject
from sparseforge_core.models import hub
from sparseforge_core.opening import source_identity
from tests.tiny import tiny_source

TEXT = Synthetic(documents_count=400)


def tiny_subject(
    home: Path, *, batch_size: int = 8, corpus: Corpus = TEXT, positions: int = 512, **changes: Any
) -> Subject:
    """The tiny LLaMA untouched: its own dense model."""
    source = tiny_source("llama", positions=positions)
    values: dict[str, Any] = {
        "model": hub.load_model(source, home).eval(),
        "tokenizer": hub.load_tokenizer(source, home),
        "identity": source_identity(source, home, 0),
        "source": source,
        "seed": 0,
        "corpus": corpus,
        "retrained": False,
        "home": home,
        "items_dir": home / "items",
        "device": torch.device("cpu"),
        "batch_size": batch_size,
        "sparse": (),
    }
    return Subject(**{**values, **changes})


def pruned(subject: Subject, share: float = 0.5) -> Any:
    """A copy of the model with the smallest weights of each matrix set to zero."""
    model = hub.load_model(subject.source, subject.home).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight[weight.abs() < weight.abs().quantile(share)] = 0.0
    return model
