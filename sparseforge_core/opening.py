"""Opening the model that a cell works on or has made: sources, other cells' checkpoints, side branches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseforge_core.checkpoint import MANIFEST, dropped, load_branches, verify
from sparseforge_core.data.cache import content_key
from sparseforge_core.errors import CheckpointMismatch, Diverged
from sparseforge_core.identity import canonical, cell_key
from sparseforge_core.models import hub
from sparseforge_core.models.families import Family
from sparseforge_core.models.sites import find_sites
from sparseforge_core.models.sources import ModelSource
from sparseforge_core.recipe import Cell, Trained
from sparseforge_core.sparsity.slorb import expand

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def cell_folder(home: Path, cell: Cell) -> Path:
    """Where everything about a cell lives."""
    return home / "cells" / cell_key(cell)


def final_folder(home: Path, cell: Cell) -> Path:
    """Where a cell's finished model lives."""
    return cell_folder(home, cell) / "train" / "final"


def divergence(directory: Path) -> str | None:
    """Why the stage that ended in `directory` has no finite result; None if it has one, or has not ended."""
    try:
        body = json.loads((directory / "measurements.json").read_text())
    except (OSError, ValueError):  # not there, or torn: whoever records it says so
        return None
    why = body.get("diverged") if isinstance(body, dict) else None
    return None if why is None else str(why)


def open_source(source: ModelSource, home: Path, seed: int) -> PreTrainedModel:
    """The model that a cell of this seed starts from or is taught by, float32, on the CPU."""
    if isinstance(source, Trained):
        return open_finished(source.cell(seed), home)
    return hub.load_model(source, home)


def open_skeleton(source: ModelSource, home: Path) -> PreTrainedModel | None:
    """The shape of the model that a recipe starts from, without weights; None where only its weights tell."""
    return hub.load_skeleton(_first_source(source), home)


def open_family(source: ModelSource, model: PreTrainedModel) -> Family:
    """The family that says what is masked in a model of this source; a trained model has that of its first source."""
    return hub.family_for(_first_source(source), model)


def _first_source(source: ModelSource) -> ModelSource:
    """Where a model came from before any cell trained it."""
    return _first_source(source.recipe.model) if isinstance(source, Trained) else source


def open_tokenizer(source: ModelSource, home: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a recipe's model; a trained model has that of the model it was trained from."""
    if isinstance(source, Trained):
        return open_tokenizer(source.recipe.model, home)
    return hub.load_tokenizer(source, home)


def weights_identity(cell: Cell, home: Path) -> str:
    """Which weights `open_finished` gives: the hashes of the files that the cell made, or the source it left untouched.

    16 hex digits. What depends on the weights, such as stored answers, is kept under it. Raises CheckpointMismatch if
    the cell has no finished model.
    """
    if not cell.recipe.method.sparsifies and not cell.recipe.method.trains:
        return source_identity(cell.recipe.model, home, cell.seed)
    try:
        manifest = json.loads((final_folder(home, cell) / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointMismatch(
            f"cell {cell_key(cell)} has no readable {MANIFEST}: {error}; run its train stage first"
        ) from error
    return content_key({"cell": cell_key(cell), "files": manifest["files"]})


def source_identity(source: ModelSource, home: Path, seed: int) -> str:
    """Which weights `open_source` gives, 16 hex digits."""
    if isinstance(source, Trained):
        return weights_identity(source.cell(seed), home)
    return content_key({"source": canonical(source)})


def open_finished(cell: Cell, home: Path) -> PreTrainedModel:
    """The model that a cell made, every file's hash checked, its side branch (if any) added to the weights.

    Adding B P to the weight computes eq. (1) exactly; the stored weights stay sparse. Raises CheckpointMismatch
    if the cell has not finished or its files were altered, Diverged if it made no model because it diverged.
    """
    model, branches = open_apart(cell, home)
    for site in find_sites(model, open_family(cell.recipe.model, model)) if branches else []:
        if site.name in branches:  # others the recipe leaves dense
            branch, projection = branches[site.name]
            matrix = site.matrix(site.weight.data)
            matrix += expand(branch, matrix.shape[-1], projection)
    return model


def open_apart(cell: Cell, home: Path) -> tuple[PreTrainedModel, dict[str, tuple[Tensor, Tensor | None]]]:
    """What a cell made with its weights as sparse as they were trained, and the branch (B, P) of each site apart.

    Raises as `open_finished`.
    """
    if not cell.recipe.method.sparsifies and not cell.recipe.method.trains:
        return open_source(cell.recipe.model, home, cell.seed), {}
    folder = final_folder(home, cell)
    if not folder.is_dir():
        if why := divergence(folder.parent):
            raise Diverged(f"cell {cell_key(cell)} made no model, it diverged: {why}")
        todo = "run its train stage first"
        if dropped(folder.parent):
            todo = f"its weights were dropped once all was measured; delete {folder.parent} to train it anew"
        raise CheckpointMismatch(f"cell {cell_key(cell)} has no finished model in {folder}; {todo}")
    verify(folder, cell_key(cell))
    model = hub.from_pretrained(
        dtype=torch.float32,
        what=f"cell {cell_key(cell)}",
        pretrained_model_name_or_path=str(folder),
        **hub.code_of(_first_source(cell.recipe.model)),
    )
    return model, load_branches(folder)
