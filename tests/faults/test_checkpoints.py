"""Checkpoints that were damaged, half deleted, or written before manifests were sealed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseforge_core import checkpoint, files
from sparseforge_core.checkpoint import Checkpoints, verify
from sparseforge_core.errors import CheckpointMismatch, Interrupted, RecipeError
from sparseforge_core.evaluate.answers import remembered
from sparseforge_core.methods import AST
from sparseforge_core.train.loop import Run, train
from tests.contract.test_methods import STEPS, recipe_of, start
from tests.faults.test_files import half_way


def stopped(folder: Path, *steps: int) -> Run:
    """A training that left checkpoints after these steps."""
    for step in steps:
        run = start(recipe_of(AST()), folder)
        seen: list[int] = []
        with pytest.raises(Interrupted):
            train(run, on_step=lambda p, seen=seen: seen.append(p.step), should_stop=lambda: seen[-1] == step)  # noqa: B023
    return start(recipe_of(AST()), folder)


def test_its_size_is_known_before_it_is_written(tmp_path: Path) -> None:
    run = stopped(tmp_path, 3)
    run.checkpoints.resume(run.model, run.optimizer, run.track)
    written = [load_file(file) for file in (tmp_path / "step-00000003").glob("*.safetensors")]
    expected = sum(x.numel() * x.element_size() for tensors in written for x in tensors.values())
    assert run.checkpoints.size(run.model, run.optimizer, run.track) == expected > 0


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    stopped(tmp_path, 3)
    file = tmp_path / "step-00000003" / "model.safetensors"
    body = bytearray(file.read_bytes())
    body[-1] ^= 1
    file.write_bytes(body)
    name = list(checkpoint.tensor_hashes(file))[-1]
    with pytest.raises(CheckpointMismatch, match=rf"truncated or altered \(tensor {name}\); delete"):
        verify(file.parent)


def test_a_manifest_whose_cell_was_altered_is_a_damaged_one_and_not_another_cells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = stopped(tmp_path, 3, 6)
    manifest = tmp_path / "step-00000006" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"cell": "cell"', '"cell": "bell"'))
    assert run.checkpoints.resume(run.model, run.optimizer, run.track) == 3
    assert "was altered" in caplog.text


def as_before(folder: Path) -> Path:
    """Write a checkpoint as the first version did: no seal, no kinds in the names. Returns its manifest."""
    manifest = folder / "manifest.json"
    body = json.loads(manifest.read_text())
    for file in folder.glob("*.safetensors"):
        save_file({name.partition("/")[2]: x for name, x in load_file(file).items()}, file)
        body["files"][file.name] = files.sha256(file)
    manifest.write_text(json.dumps({name: body[name] for name in ("cell", "step", "files")}))
    return manifest


def test_a_checkpoint_of_the_first_version_is_read(tmp_path: Path) -> None:
    run = stopped(tmp_path, 3)
    manifest = tmp_path / "step-00000003" / "manifest.json"
    body = json.loads(manifest.read_text())
    as_before(manifest.parent)
    assert run.checkpoints.resume(run.model, run.optimizer, run.track) == 3
    manifest.write_text(json.dumps({name: body[name] for name in ("cell", "step", "files", "tensors")}))
    with pytest.raises(CheckpointMismatch, match="none of the 1 checkpoints"):
        run.checkpoints.resume(run.model, run.optimizer, run.track)


def test_checkpoints_half_deleted_at_the_end_of_a_training_are_no_damaged_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(tmp_path / "checkpoints", 3, 6)
    with monkeypatch.context() as patch:
        half_way(patch)
        with pytest.raises(KeyboardInterrupt):
            run.checkpoints.clear()
    again = Checkpoints(tmp_path / "checkpoints", "cell")
    assert again.resume(run.model, run.optimizer, run.track) == 0
    files.remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_goes_on_says_the_same_of_its_masks(tmp_path: Path) -> None:
    straight = start(recipe_of(AST()), tmp_path / "straight")
    train(straight)
    resumed = stopped(tmp_path / "stopped", 13)
    train(resumed)
    rates = [[run.tracker.scalars_at(step)["mask/flip_rate"] for step in (14, STEPS)] for run in (straight, resumed)]  # type: ignore[attr-defined]
    assert rates[0] == rates[1]
    assert rates[0][0] > 0, "there is nothing to tell apart"


def test_an_evaluation_killed_after_its_last_answer_asks_nothing_again(tmp_path: Path) -> None:
    def run(left: list[int]) -> object:
        assert left, "there is nothing to run"
        return iter([{item: torch.tensor(item).item() for item in left}])

    for _ in range(2):
        assert remembered(tmp_path, "task", {"model": "m"}, ["a", "b"], run) == [0, 1]  # type: ignore[arg-type]


def test_a_whole_number_beyond_the_databases_is_refused_by_its_field() -> None:
    from sparseforge_core import specs
    from sparseforge_core.recipe import TrainPlan

    body = specs.encode(TrainPlan(), omit_defaults=False)
    with pytest.raises(RecipeError, match=r"train\.steps: expected an int of at most \d+, found one of 401 digits"):
        specs.decode({**body, "steps": 10**400}, TrainPlan, "train")
