"""A teacher that another cell made of the reader's own seed: each seed is taught by the one that read its text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import CheckpointMismatch
from sparseforge_core.evaluate.suites import DivergenceSuite
from sparseforge_core.identity import cell_key
from sparseforge_core.methods import DenseControl, FrozenMask, Wanda
from sparseforge_core.objective import Distill
from sparseforge_core.opening import cell_folder, open_finished, open_source, source_identity
from sparseforge_core.recipe import Cell, Recipe, Trained, TrainPlan
from sparseforge_core.run import evaluate_cell, train_cell
from sparseforge_core.sparsity.patterns import nm
from tests.tiny import tiny_source, tokens

SOURCE = tiny_source("llama")
CONTROL = Recipe(
    model=SOURCE,
    method=DenseControl(),
    corpus=Synthetic(documents_count=200),
    train=TrainPlan(steps=2, sequences=2, length=16),
)
OWN = Trained(recipe=CONTROL, seed=None)
PUPIL = replace(CONTROL, method=FrozenMask(), pattern=nm(2, 4), objective=Distill(kl_weight=1.0, teacher=OWN))


def context(cell: Cell, home: Path) -> dict[str, Any]:
    written = json.loads((cell_folder(home, cell) / "train" / "measurements.json").read_text())
    return dict(written["context"])


def trained(cell: Cell, home: Path) -> torch.Tensor:
    train_cell(cell, cell_folder(home, cell) / "train", home)
    return open_finished(cell, home)(input_ids=tokens()).logits.detach()


def test_a_cell_may_start_from_the_model_of_its_own_seed(tmp_path: Path) -> None:
    first = Cell(recipe=CONTROL, seed=1)
    started = trained(first, tmp_path)
    pruned = Cell(
        recipe=Recipe(model=OWN, method=Wanda(samples=2, length=16), corpus=CONTROL.corpus, pattern=nm(2, 4)), seed=1
    )
    assert not torch.equal(trained(pruned, tmp_path), started)
    suite = DivergenceSuite(name="kl", window=16, limit=2)
    written = evaluate_cell(pruned, suite, cell_folder(tmp_path, pruned) / "kl", tmp_path).read_text()
    (row,) = (row for row in json.loads(written)["measurements"] if row["metric"] == "kl_to_dense")
    assert row["value"] > 0, "set against the dense model of seed 1: there is no other"


def test_a_pupil_is_taught_by_the_model_of_its_own_seed(tmp_path: Path) -> None:
    teachers = {seed: Cell(recipe=CONTROL, seed=seed) for seed in (0, 1)}
    logits = {0: trained(teachers[0], tmp_path)}
    with pytest.raises(CheckpointMismatch, match=re.escape(cell_key(teachers[1]))):
        trained(Cell(recipe=PUPIL, seed=1), tmp_path)
    logits[1] = trained(teachers[1], tmp_path)
    assert not torch.equal(logits[0], logits[1])
    for seed, expected in logits.items():
        assert torch.equal(open_source(OWN, tmp_path, seed)(input_ids=tokens()).logits, expected)
    assert source_identity(OWN, tmp_path, 0) != source_identity(OWN, tmp_path, 1)
    pupil = trained(Cell(recipe=PUPIL, seed=1), tmp_path)
    assert context(Cell(recipe=PUPIL, seed=1), tmp_path)["teacher"] == source_identity(OWN, tmp_path, 1)
    assert "teacher" not in context(teachers[1], tmp_path)
    named = replace(PUPIL, objective=Distill(kl_weight=1.0, teacher=replace(OWN, seed=1)))
    assert torch.equal(pupil, trained(Cell(recipe=named, seed=1), tmp_path))
    other = replace(PUPIL, objective=Distill(kl_weight=1.0, teacher=replace(OWN, seed=0)))
    assert not torch.equal(pupil, trained(Cell(recipe=other, seed=1), tmp_path))
