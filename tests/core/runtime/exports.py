"""Pruned tiny models on disk, and exports of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparseforge_core.export.source import Exportable, open_folder
from sparseforge_core.export.write import export
from sparseforge_core.models.sites import assign_patterns
from sparseforge_core.sparsity.patterns import Pattern, nm, top_mask
from tests.tiny import sites_of, tiny_model, tokens

TWO_FOUR = nm(2, 4)


def pruned_model(architecture: str, pattern: Pattern = TWO_FOUR, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model whose sites fit `pattern`, some kept weights exactly zero."""
    model = tiny_model(architecture, width=32).to(dtype)
    with torch.no_grad():
        for site in assign_patterns(sites_of(model), pattern):
            matrix = site.matrix(site.weight)
            kept = top_mask(matrix.abs().float(), pattern)
            kept[..., 0, :] = False
            matrix.copy_(torch.where(kept, matrix, torch.zeros_like(matrix)))
    return model


def source_of(model: Any, folder: Path, pattern: Pattern = TWO_FOUR) -> Exportable:
    """The model saved by transformers and opened for export."""
    model.save_pretrained(folder)
    return open_folder(folder, pattern)


def packed_export(model: Any, folder: Path, pattern: Pattern = TWO_FOUR, **options: Any) -> Path:
    """A packed export of the model."""
    export(source_of(model, folder / "saved", pattern), folder / "packed", form="packed", **options)
    return folder / "packed"


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """Logits of some tokens."""
    return model(input_ids=tokens()).logits  # type: ignore[no-any-return]
