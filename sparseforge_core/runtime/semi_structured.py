"""A packed export as torch's own semi-structured tensors, where a GPU is there to use them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparseforge_core.checkpoint import BRANCHES
from sparseforge_core.errors import ExportError
from sparseforge_core.runtime.loading import load_packed
from sparseforge_core.runtime.manifest import WEIGHTS, Entry, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS, COLUMNS = 32, 64
"""torch's smallest tile of fp16 and bf16; both sizes of a weight must be multiples."""


def load_semi_structured(folder: Path, device: str = "cuda") -> tuple[PreTrainedModel, dict[str, str]]:
    """The model with a semi-structured weight in every `nn.Linear` that can have one, and why the others are dense.

    Raises ExportError without a CUDA device, or where no weight can become semi-structured.
    """
    if not torch.cuda.is_available():
        raise ExportError(
            "torch's semi-structured tensors need a CUDA device and this machine has none; `load_sparse` runs the "
            "same export here"
        )
    manifest = read_manifest(folder, skip=(WEIGHTS,))
    if (folder / BRANCHES).is_file():
        raise ExportError(
            f"{folder} has side branches, which torch's semi-structured tensors cannot carry; use load_sparse"
        )
    sites = {name: entry for name, entry in manifest.tensors.items() if entry.layout is not None}
    refused = {name: why for name, entry in sites.items() if (why := refusal(entry))}
    if len(refused) == len(sites):
        first = next(iter(refused.items()), ("it", "holds no packed weight"))
        raise ExportError(f"{folder}: no weight can become semi-structured; {first[0]}: {first[1]}")
    model: Any = load_packed(folder, dense=True)[0].to(device)  # type: ignore[arg-type]
    for name in sites.keys() - refused.keys():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if type(module) is not nn.Linear:
            refused[name] = f"{type(module).__name__} is no Linear"
            continue
        sparse = torch.sparse.to_sparse_semi_structured(getattr(module, attribute).detach())
        setattr(module, attribute, nn.Parameter(sparse, requires_grad=False))
    return model, refused


def refusal(entry: Entry) -> str | None:
    """Why a packed weight cannot become semi-structured, or None."""
    layout = entry.layout
    if layout is None or layout.name != "2:4":
        return f"its pattern is {layout.name if layout else 'dense'}, not 2:4"
    if entry.dtype not in ("BF16", "F16"):
        return f"its type is {entry.dtype}; export with --dtype bfloat16 or float16"
    if layout.transposed or len(entry.shape) != 2:
        return "it is not stored as an [out, in] matrix"
    if entry.shape[0] % ROWS or entry.shape[1] % COLUMNS:
        return f"{list(entry.shape)} are no multiples of {ROWS} x {COLUMNS}"
    return None
