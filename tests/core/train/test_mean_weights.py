"""Training that ends with a mean of weights: what the mean is, that masks hold in it, and that it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import RecipeError
from sparseforge_core.memory import Spread, lines, shape_of
from sparseforge_core.methods import AST, FrozenMask, MaskLLM, Method, SparseForge
from sparseforge_core.objective import Distill
from sparseforge_core.objective.correction import TeacherCorrection
from sparseforge_core.recipe import Cell, Recipe, TrainPlan
from sparseforge_core.run import train_cell
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.train.mean_weights import MeanWeights
from tests.core.train.stopping import whole_and_in_parts
from tests.tiny import tiny_model, tiny_source

STEPS = 12


def _cell(method: Method, averaged_from: float, objective: Distill | None = None) -> Cell:
    plan = TrainPlan(steps=STEPS, sequences=4, length=16, lr=WarmupLinear(peak=3e-3), averaged_from=averaged_from)
    return Cell(
        recipe=Recipe(
            model=tiny_source("llama"),
            method=method,
            corpus=Synthetic(documents_count=60),
            pattern=nm(2, 4),
            objective=objective or Distill(),
            train=plan,
        )
    )


def _weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted((folder / "final").glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_the_mean_is_that_of_the_steps_from_the_first_one_on() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    mean = MeanWeights(layer, first=4)
    seen = []
    for step in range(1, 8):
        with torch.no_grad():
            layer.weight.normal_()
            layer.bias.normal_()
        mean.take(step)
        if step >= 4:
            seen.append(layer.weight.detach().clone())
    mean.put()
    torch.testing.assert_close(layer.weight, torch.stack(seen).mean(0))
    before = layer.weight.detach().clone()
    MeanWeights(layer, first=4).put()
    assert torch.equal(layer.weight, before), "a mean of no steps changes nothing"


@pytest.mark.parametrize("method", [FrozenMask(), SparseForge(), AST()], ids=lambda m: m.kind)
def test_a_training_ends_with_the_mean_of_its_steps_in_the_pattern(tmp_path: Path, method: Method) -> None:
    train_cell(_cell(method, 0.5), tmp_path / "mean", tmp_path / "home")
    train_cell(_cell(method, 1.0), tmp_path / "last", tmp_path / "home")
    mean, last = (_weights(tmp_path / name) for name in ("mean", "last"))
    assert mean.keys() == last.keys()
    assert any(not torch.equal(mean[name], last[name]) for name in mean)
    masked = [name for name in mean if "proj" in name and mean[name].ndim == 2]
    assert masked
    for name in masked:
        assert int((mean[name].unflatten(-1, (-1, 4)) != 0).sum(-1).max()) <= 2
    losses = [
        [line for line in (tmp_path / name / "journal.jsonl").read_text().splitlines() if "loss/total" in line]
        for name in ("mean", "last")
    ]
    ours, theirs = ([json.loads(line)["scalars"]["loss/total"] for line in of] for of in losses)
    assert ours == theirs, "averaging looks on"


@pytest.mark.parametrize("stop", [3, 9])
def test_a_stopped_run_resumes_to_the_bit(tmp_path: Path, stop: int) -> None:
    cell = _cell(FrozenMask(), 0.5, Distill(correction=TeacherCorrection(rate_scale=0.5)))
    hashes = whole_and_in_parts(cell, tmp_path, stop)
    assert hashes[0] == hashes[1]


def test_a_share_outside_of_the_plan_is_refused_and_the_mean_is_in_the_memory() -> None:
    for share in (-0.1, 1.5):
        with pytest.raises(RecipeError, match="averaged_from="):
            TrainPlan(averaged_from=share)
    with pytest.raises(RecipeError, match=r"averaged_from=0\.5: method 'maskllm'"):
        _cell(MaskLLM(prior=None), 0.5)
    assert not TrainPlan(steps=10).averages
    assert TrainPlan(steps=10, averaged_from=0.25).averaged_after == 2
    model = tiny_model("llama")
    shape = shape_of("tiny", model.config, [(64, 64)], sum(p.numel() for p in model.parameters()))
    counts = [sum(line.count for line in lines(shape, Spread(mean_bytes=each))) for each in (0, 4)]
    assert counts[1] - counts[0] == 4 * shape.parameters
