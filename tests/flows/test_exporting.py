"""`export`, `verify-export` and `generate` on a trained cell, from its key to the words it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flows.exporting import pattern_named
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import RecipeError
from sparseforge_core.identity import cell_key
from sparseforge_core.methods import SRSTE
from sparseforge_core.opening import cell_folder, open_finished
from sparseforge_core.recipe import Cell, Recipe, TrainPlan
from sparseforge_core.run import train_cell
from sparseforge_core.runtime import load_sparse
from sparseforge_core.sparsity.patterns import BLOCK_16, nm
from sparseforge_core.sparsity.slorb import SLoRB
from tests.core.runtime.exports import logits_of
from tests.flows.test_cli import run
from tests.tiny import tiny_source


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cell, Path]:
    """A cell of a few steps, with side branches, and its home."""
    home = tmp_path_factory.mktemp("home")
    recipe = Recipe(
        model=tiny_source("llama", width=32),
        method=SRSTE(),
        corpus=Synthetic(documents_count=50),
        pattern=nm(2, 4),
        train=TrainPlan(steps=6, sequences=2, length=16),
        slorb=SLoRB(k=8),
    )
    cell = Cell(recipe=recipe)
    train_cell(cell, cell_folder(home, cell) / "train", home)
    return cell, home


def test_a_cell_goes_out_and_speaks(trained: tuple[Cell, Path], capsys: pytest.CaptureFixture[str]) -> None:
    cell, home = trained
    key = cell_key(cell)
    assert run("export", key, "--format", "packed", "--home", home) == 0
    folder = home / "exports" / f"{key}-packed"
    assert str(folder) in capsys.readouterr().out
    assert torch.equal(logits_of(load_sparse(folder)), logits_of(open_finished(cell, home)))
    assert run("verify-export", folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "sparseforge-packed"
    assert found["sites"] == 14
    assert found["groups"] == 2 * (4 * 32 * 32 + 3 * 32 * 64) // 4
    card = (folder / "README.md").read_text()
    assert all(said in card for said in (key, "| train | coverage |", "SLoRB", '"kind": "recipe"', "No public engine"))
    prompt = ("generate", folder, "--prompt", "the cat", "--tokens", "5")
    assert run(*prompt) == 0
    first = capsys.readouterr()
    assert "14 sites packed" in first.err
    assert run(*prompt, "--dense") == 0
    dense = capsys.readouterr()
    assert first.out == dense.out
    assert "14 sites dense (asked for)" in dense.err
    assert run(*prompt, "--json", "--temperature", "1.0", "--seed", "3") == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) <= 5


def test_a_cell_goes_out_by_its_folder_for_transformers(
    trained: tuple[Cell, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell, home = trained
    for number, folder in enumerate((cell_folder(home, cell), cell_folder(home, cell) / "train" / "final")):
        out = tmp_path / str(number)
        assert run("export", folder, "--format", "hf", "--dtype", "bfloat16", "--out", out) == 0
        assert run("verify-export", out) == 0
        assert "intact sparseforge-hf" in capsys.readouterr().out
    assert run("generate", tmp_path / "0", "--prompt", "the") == 2
    assert "is a sparseforge-hf export, not sparseforge-packed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["export", "gone-s0", "--format", "packed"], "gone-s0 is no cell"),
        (["export", "gone-s0", "--format", "compressed-tensors"], "compressed-tensors reads no 2:4 weights"),
        (["export", "gone-s0", "--format", "packed", "--dtype", "int4"], "unknown dtype 'int4'"),
        (["export", ".", "--format", "packed", "--pattern", "half"], "--pattern half: give N:M"),
        (["verify-export", "gone"], "is no complete export"),
        (["generate", "gone", "--prompt", "x"], "is no complete export"),
        (["generate", "gone", "--prompt", "x", "--tokens", "0"], "tokens=0: at least 1"),
    ],
)
def test_bad_requests_get_a_sentence(
    home: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert list(home.iterdir()) == []


def test_patterns_by_name() -> None:
    assert pattern_named("4:8") == nm(4, 8)
    assert pattern_named("block-16") == BLOCK_16
    with pytest.raises(RecipeError, match="keep=4"):
        pattern_named("4:4")
