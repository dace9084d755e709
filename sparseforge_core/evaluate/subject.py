"""What is measured: a finished model and everything about it that a suite may need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparseforge_core.data.corpora import Corpus
from sparseforge_core.models.sources import ModelSource
from sparseforge_core.opening import open_source, source_identity


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under measurement."""

    model: Any
    """On `device`, in evaluation mode."""
    tokenizer: Any
    identity: str
    """Which weights these are; answers are kept under it."""
    source: ModelSource
    """The dense model that the recipe starts from."""
    seed: int
    """Of the cell."""
    corpus: Corpus
    """The recipe's text."""
    retrained: bool
    """Whether the weights were trained on the corpus."""
    home: Path
    items_dir: Path
    """Where the cell keeps its answers."""
    device: torch.device
    batch_size: int
    sparse: Sequence[tuple[int, float]]
    """(parameters, density) of each masked weight."""

    def dense(self) -> Subject:
        """The recipe's own dense model, whose answers are kept once for all cells that start from it."""
        identity = source_identity(self.source, self.home, self.seed)
        return Subject(
            model=open_source(self.source, self.home, self.seed).to(self.device).eval(),  # type: ignore[arg-type]
            tokenizer=self.tokenizer,
            identity=identity,
            source=self.source,
            seed=self.seed,
            corpus=self.corpus,
            retrained=False,
            home=self.home,
            items_dir=self.home / "dense" / identity / "items",
            device=self.device,
            batch_size=self.batch_size,
            sparse=(),
        )
