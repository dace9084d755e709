"""What a grid costs before it is run: hours, time and disk, by arithmetic that can be checked by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows import cli, planning
from flows.grids import grid_named
from flows.grids.planned import Grid, Planned, Slot, expand
from flows.grids.zoo import LLAMA2_7B, QWEN3_8B
from flows.home import Home
from flows.planning import CHECKPOINTS, bill, checkpoint_bytes, corpus_tokens, final_bytes, size, token_bytes
from sparseforge_core.data.corpora import C4, HubText, PythonDocs, Synthetic, TextFiles
from sparseforge_core.methods import Dense, FrozenMask, MagnitudePruning, MaskLLM, SparseForge, SparseGPT, Wanda
from sparseforge_core.recipe import Cell, Recipe, TrainPlan
from sparseforge_core.sparsity.patterns import nm
from tests.tiny import tiny_source

FORGE = Recipe(model=LLAMA2_7B, method=SparseForge(), corpus=C4, pattern=nm(2, 4), train=TrainPlan(steps=100))
DENSE = Recipe(model=LLAMA2_7B, method=Dense(), corpus=C4)
PARAMETERS = 6_738_400_000


def test_sizes_by_hand() -> None:
    assert final_bytes(FORGE) == 4 * PARAMETERS
    assert final_bytes(DENSE) == 0
    assert checkpoint_bytes(FORGE) == 25 * PARAMETERS
    assert checkpoint_bytes(DENSE) == 0
    assert token_bytes(FORGE) == 12_000_000 * 460 * 2
    assert token_bytes(replace(FORGE, model=QWEN3_8B)) == 12_000_000 * 460 * 4
    assert [size(count) for count in (512, 2**21, 3 * 2**41)] == ["512 B", "2.0 MiB", "6.0 TiB"]


def test_checkpoints_are_no_larger_than_the_arithmetic_says(tmp_path: Path) -> None:
    """A real one, of the smoke grid's SparseForge cell, against 25 bytes of each of its parameters."""
    from sparseforge_core.errors import Interrupted
    from sparseforge_core.identity import loads
    from sparseforge_core.run import train_cell

    plan = expand(grid_named("tiny-smoke"))
    cells = {cell.variant: loads(cell.cell_json) for cell in plan.cells}
    folder = tmp_path / "cells" / next(c.key for c in plan.cells if c.variant == "pretraining")
    train_cell(cells["pretraining"], folder / "train", tmp_path)
    with pytest.raises(Interrupted):
        train_cell(cells["SparseForge"], tmp_path / "forge", tmp_path, should_stop=lambda: True)
    written = sum(path.stat().st_size for path in (tmp_path / "forge" / "checkpoints").rglob("*.safetensors"))
    parameters = sum(path.stat().st_size for path in (folder / "train" / "final").rglob("*.safetensors")) / 4
    assert 12 * parameters < written < 25 * parameters


def test_corpora_of_known_and_unknown_size(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 1000)
    assert corpus_tokens(TextFiles.of(text)) == 1250
    assert corpus_tokens(TextFiles(paths=("gone",), sha256=("0" * 64,))) is None
    assert corpus_tokens(HubText(id="a/b", revision="main")) is None
    assert corpus_tokens(Synthetic(documents_count=10)) == 1000
    assert corpus_tokens(PythonDocs()) == planning.SMALL_CORPUS


def grid(*entries: Planned) -> Any:
    return expand(Grid(name="g", title="G", entries=entries, captions={}))


def test_a_bill_adds_up_and_done_cells_cost_nothing(home: Path) -> None:
    plan = grid(
        Planned(recipe=FORGE, variant="f", seeds=(0, 1), slots=(Slot(exhibit="table-2", row="f", label="F"),)),
        Planned(recipe=DENSE, variant="d"),
    )
    whole = bill(plan, "g", Home.of(), workers=2)
    assert (whole.cells, whole.done, whole.known) == (3, 0, {"planned": 3})
    assert whole.disk.finals == 2 * 4 * PARAMETERS
    assert whole.disk.checkpoints == 2 * CHECKPOINTS * 25 * PARAMETERS
    assert whole.disk.tokens == 12_000_000 * 460 * 2, "one file, of one corpus and one tokenizer"
    assert whole.hours.keys() == whole.seconds.keys() == {cell.pool for cell in plan.cells}
    alone = bill(plan, "g", Home.of(), workers=1)
    assert alone.disk.checkpoints == CHECKPOINTS * 25 * PARAMETERS
    assert sum(alone.seconds.values()) == pytest.approx(3600 * sum(c.cost_hours for c in plan.cells), rel=1e-3)
    done = frozenset((cell.key, "train") for cell in plan.cells if cell.seed == 0)
    rest = bill(plan, "g", Home.of(), workers=2, done=done)
    assert (rest.done, rest.disk.finals_of, rest.disk.at_work) == (2, 1, 1)


def test_a_solution_that_many_cells_start_from_is_counted_once_a_seed(home: Path) -> None:
    plans = [TrainPlan(steps=steps) for steps in (10, 20)]
    frozen = [replace(FORGE, method=FrozenMask(prior=SparseGPT()), train=plan) for plan in plans]
    learned = replace(FORGE, method=MaskLLM(), slorb=None)
    others = [replace(FORGE, method=FrozenMask(prior=prior)) for prior in (Wanda(), MagnitudePruning())]
    entries = [
        Planned(recipe=r, variant=f"v{i}", seeds=(0, 1)) for i, r in enumerate([*frozen, learned, *others, FORGE])
    ]
    disk = bill(grid(*entries), "g", Home.of(), workers=1).disk
    assert disk.solutions_of == 2 * 2, "SparseGPT's and Wanda's, of two seeds; magnitude needs no text"
    assert disk.solutions == 2 * (int(4.125 * PARAMETERS) + int(PARAMETERS / 8))
    assert disk.needed == disk.finals + disk.checkpoints + disk.solutions + disk.tokens
    assert any("one-shot solutions" in line for line in disk.lines)


def test_a_kept_solution_is_no_larger_than_the_arithmetic_says(tmp_path: Path) -> None:
    from sparseforge_core.models.hub import load_model
    from sparseforge_core.run import train_cell

    source = tiny_source("llama")
    recipe = Recipe(
        model=source,
        method=FrozenMask(prior=SparseGPT(samples=4, length=16)),
        corpus=source.tokenizer.corpus,  # type: ignore[attr-defined]
        pattern=nm(2, 4),
        train=TrainPlan(steps=1, sequences=2, length=16),
    )
    train_cell(Cell(recipe=recipe), tmp_path / "cell", tmp_path)
    written = sum(path.stat().st_size for path in (tmp_path / "solutions").rglob("*.safetensors"))
    parameters = sum(parameter.numel() for parameter in load_model(source, tmp_path).parameters())
    assert 2 * parameters < written < 4.125 * parameters


def test_a_disk_that_is_too_small_is_a_warning_by_name(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = planning.shutil.disk_usage(home)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    assert cli.main(["plan", "tiny-smoke", "--json", "--workers", "3"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["disk"]["fits"] is False
    assert found["eta"]["workers"] == 3
    assert f"warning: disk {found['disk']['folder']}:" in said.err
    assert "name another folder with --home" in said.err
    assert cli.main(["plan", "tiny-smoke", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "bytes a parameter" in text
    assert "token files" in text
    assert "pretraining" not in text


def test_an_unknown_corpus_is_named_and_not_counted(home: Path) -> None:
    endless = replace(FORGE, corpus=HubText(id="some/thing", revision="main"))
    found = bill(grid(Planned(recipe=endless, variant="f")), "g", Home.of(), workers=1)
    assert (found.disk.tokens, found.disk.files) == (0, 0)
    assert any("some/thing" in line for line in found.lines())


def test_workers_must_be_some(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "tiny-smoke", "--workers", "0"]) == 2
    assert "needs at least 1" in capsys.readouterr().err
