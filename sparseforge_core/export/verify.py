"""The proof that an export is intact: every file, every tensor, every group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseforge_core import specs
from sparseforge_core.errors import ExportError
from sparseforge_core.models import hub
from sparseforge_core.runtime.archive import open_archive
from sparseforge_core.runtime.container import digest
from sparseforge_core.runtime.loading import check_configuration
from sparseforge_core.runtime.manifest import PACKED, Entry, read_manifest
from sparseforge_core.sparsity.patterns import Pattern, check_weight


@dataclass(frozen=True)
class Verified:
    """What an intact export holds."""

    format: str
    tensors: int
    sites: int
    groups: int
    """Groups of masked weights, each checked."""
    bytes: int
    """Of the whole folder."""


def verify_export(folder: Path) -> Verified:
    """Check every file, every tensor and every group of an export.

    Raises ExportError naming what is missing, truncated or altered, PatternViolation naming site and group.
    """
    manifest = read_manifest(folder)
    groups = 0
    if manifest.format == PACKED:
        check_configuration(folder, manifest)
        with open_archive(folder, manifest) as archive:
            for name, entry in manifest.tensors.items():
                groups += _groups(entry)
                _check_hash(name, archive.dense(name), entry)
    else:
        model = hub.from_pretrained(dtype="auto", what=str(folder), pretrained_model_name_or_path=str(folder))
        for name, entry in manifest.tensors.items():
            weight = _parameter(folder, model, name)
            _check_hash(name, weight, entry)
            said = manifest.about["sites"][name]
            pattern = specs.decode(said["pattern"], Pattern, name)  # type: ignore[type-abstract]
            matrix = weight.transpose(-1, -2) if said["transposed"] else weight
            check_weight(matrix, pattern, name)
            groups += pattern.groups(matrix).shape[:-1].numel()
    size = sum(file.stat().st_size for file in folder.iterdir())
    return Verified(manifest.format, len(manifest.tensors), len(manifest.about["sites"]), groups, size)


def _groups(entry: Entry) -> int:
    return 0 if entry.layout is None else torch.Size(entry.shape).numel() // entry.layout.group


def _check_hash(name: str, tensor: Tensor, entry: Entry) -> None:
    if digest(tensor) != entry.sha256:
        raise ExportError(f"{name} is not the tensor that was exported; export the model anew")


def _parameter(folder: Path, model: Any, name: str) -> Tensor:
    found = dict(model.named_parameters()).get(name)
    if found is None:
        raise ExportError(f"{folder}: the model has no weight {name}; export it anew")
    return found.detach()  # type: ignore[no-any-return]
