"""The study's second model: the contenders as they are on a model that a cell makes, carried, run, packed and told."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from analysis.make_tables import make_tables
from analysis.study_parts import planned_study
from analysis.study_second import section
from flows import grids
from flows.bundle import Only, _not_carried, choose, write_bundle
from flows.grids import grid_named
from flows.grids.planned import Grid, Planned, Slot, expand
from flows.grids.study import BOOKS, OTHER_BOOKS
from flows.grids.study_gpt2 import GPT2, IN_ORDER, NAME, PRETRAINING, ROWS, SUITES, TEXTS, second
from flows.grids.study_grid import OURS, TUNED, untrained
from flows.home import Home
from flows.ingesting import ingest
from flows.placements import card_of, placement_for
from flows.unpacking import unpacked
from sparseforge_core import bundles
from sparseforge_core.data.corpora import DATA_ENV, TextFiles
from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.suites import WIKITEXT_ENV, Suite
from sparseforge_core.identity import loads
from sparseforge_core.models.hub import load_skeleton, load_tokenizer
from sparseforge_core.models.sources import TokenizerDir, TrainedBPE
from sparseforge_core.packing import pack
from sparseforge_core.recipe import Recipe, Trained
from sparseforge_core.store.results import Results
from sparseforge_core.store.store import ResultStore

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 64
SHARED = ROOT.parent / "shared" / "data"


def test_every_row_is_the_studys_contender_on_another_model() -> None:
    grid = grid_named(NAME)
    rows = {slot.row: entry for entry in grid.entries for slot in entry.slots}
    ordered = f"{IN_ORDER}-in-order"
    assert set(rows) == {*untrained(BOOKS), *ROWS, ordered}
    assert dataclasses.replace(rows[ordered].recipe, permutation=None) == rows[IN_ORDER].recipe
    assert (rows[ordered].seeds, rows[ordered].recipe.permutation) == (
        rows[IN_ORDER].seeds,
        rows["improved"].recipe.permutation,
    )
    assert {entry.suites for entry in rows.values()} == {SUITES}
    for name, seeds in ROWS.items():
        study = OURS.contender(name, BOOKS).recipe(12_000_000)
        assert dataclasses.replace(rows[name].recipe, model=study.model) == study, "no setting differs"
        assert rows[name].seeds == seeds
        assert TUNED[name] in (study.train.lr.peak,)  # type: ignore[attr-defined]
    assert {entry.recipe.model for entry in rows.values()} == {Trained(recipe=PRETRAINING)}
    assert {entry.recipe.corpus for entry in rows.values()} == {BOOKS}
    assert len(rows["improved"].seeds) == len(rows["frozen-sparsegpt"].seeds) == 3


def test_the_text_that_is_reported_was_seen_by_no_pretraining_and_windows_fit_the_positions() -> None:
    assert {*BOOKS.sha256} < {*PRETRAINING.corpus.sha256}
    assert not {*PRETRAINING.corpus.sha256} & {*OTHER_BOOKS.sha256}
    assert {suite.window for suite in SUITES} == {GPT2.positions}  # type: ignore[attr-defined]


def test_every_cell_waits_for_the_one_pretraining_and_brings_it_along() -> None:
    plan = expand(grid_named(NAME))
    (first,) = (cell for cell in plan.cells if cell.variant == "pretraining")
    assert {cell.requires for cell in plan.cells if cell is not first} == {(first.key,)}
    assert (first.model, first.family, first.pattern) == ("gpt2-124M", "gpt2", "dense")
    assert first.tokens == 170_393_600
    assert placement_for(PRETRAINING).pool == "gpu-1"
    chosen = choose([NAME], only=Only(variants=("AST",)))
    assert [cell.variant for cell in chosen.cells.values()] == ["pretraining", "AST"]
    assert chosen.levels() == {key: number for number, key in enumerate(chosen.cells)}


@pytest.mark.skipif(not (SHARED / "tokenizers").is_dir(), reason="needs ../shared/data/tokenizers beside the checkout")
def test_the_shape_is_gpt2s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_ENV, str(SHARED))
    model = load_skeleton(GPT2, tmp_path)
    assert model is not None
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
    assert card_of(GPT2).parameters == pytest.approx(124_439_808, rel=0.01)
    assert load_tokenizer(GPT2, tmp_path).eos_token_id == 50_256


def test_a_tokenizer_in_the_data_folder_travels_and_another_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_ENV, str(tmp_path))
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    carried = dataclasses.replace(GPT2, tokenizer=TokenizerDir(path="words", sha256="0" * 64))
    recipe = dataclasses.replace(PRETRAINING, model=carried)
    from sparseforge_core.recipe import Cell

    assert _not_carried([Cell(recipe=recipe)]) == []
    absolute = dataclasses.replace(carried, tokenizer=TokenizerDir(path=str(folder), sha256="0" * 64))
    (said,) = _not_carried([Cell(recipe=dataclasses.replace(recipe, model=absolute))])
    assert "the tokenizer in the folder" in said
    with pytest.raises(DataError, match="is not the tokenizer that the recipe names; relative paths start at"):
        load_tokenizer(carried, tmp_path)


# ------------------------------------------------------------------- the same grid, small, on the project's own prose


def text_files(folder: Path) -> tuple[TextFiles, TextFiles]:
    """The project's documentation as two corpora in the data folder: English that is there wherever the tests are."""
    for name, paths in (("prose", (ROOT / "docs").glob("*.md")), ("other", ROOT.glob("*.md"))):
        paragraphs = [p for path in sorted(paths) for p in path.read_text().split("\n\n")]
        (folder / f"{name}.txt").write_text("".join(f"{p}\n<|endoftext|>\n" for p in paragraphs if len(p) > 100))
    return TextFiles.of("prose.txt"), TextFiles.of("other.txt")


def small(text: TextFiles, other: TextFiles) -> Grid:
    """The grid with two blocks of width 64 and a few steps; methods, objectives and rates as they are."""
    tiny = dataclasses.replace(
        GPT2, tokenizer=TrainedBPE(corpus=text, size=512), width=64, layers=2, heads=2, positions=LENGTH, mlp=256
    )

    def shortened(recipe: Recipe, steps: int) -> Recipe:
        plan = dataclasses.replace(recipe.train, sequences=2, length=LENGTH, compute_dtype="float32")
        plan = dataclasses.replace(plan, steps=steps if recipe.train.steps else 0)
        method: Any = recipe.method
        for name in ("samples", "calibration_samples"):
            if hasattr(method, name):
                method = dataclasses.replace(method, **{name: 8})
        for name in ("prior", "start_from"):
            if getattr(method, name, None) is not None and hasattr(getattr(method, name), "samples"):
                method = dataclasses.replace(method, **{name: dataclasses.replace(getattr(method, name), samples=8)})
        return dataclasses.replace(recipe, corpus=text, train=plan, method=method)

    def suite(one: Any) -> Suite:
        changed = dataclasses.replace(one, window=LENGTH, limit=4)
        return dataclasses.replace(changed, corpus=other) if getattr(one, "corpus", None) else changed

    pretraining = shortened(dataclasses.replace(PRETRAINING, model=tiny), 40)
    entries: list[Planned] = []
    for entry in second(Trained(recipe=pretraining)).entries:
        slots: tuple[Slot, ...] = tuple(
            dataclasses.replace(slot, suites=tuple(map(suite, slot.suites))) for slot in entry.slots
        )
        recipe, suites = shortened(entry.recipe, 60), tuple(map(suite, entry.suites))
        entries.append(dataclasses.replace(entry, recipe=recipe, suites=suites, slots=slots))
    return dataclasses.replace(second(), entries=tuple(entries))


@pytest.mark.slow
def test_the_grid_comes_home_from_two_processes_that_share_one_pretraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setenv(DATA_ENV, str(data))
    monkeypatch.setenv(WIKITEXT_ENV, str(data))
    grid = small(*text_files(data))
    (data / "wiki.test.raw").write_text("".join(f" {p}\n" for p in (data / "prose.txt").read_text().split("\n")))
    monkeypatch.setitem(grids.GRIDS, NAME, lambda: grid)
    folder = tmp_path / "carried"
    count = write_bundle(choose([NAME]), folder)
    stages = count + (count - 1) * len(SUITES)
    assert count == 18
    command = [sys.executable, "-m", "sparseforge_core.run", "bundle", str(folder), "--drop-models"]
    environment = {**os.environ, "PYTHONPATH": str(folder / bundles.CODE), "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if name not in (DATA_ENV, WIKITEXT_ENV)}
    started = [
        subprocess.Popen(command, env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=500)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    done = [key for text in said for key in re.findall(r"cell (\S+) done", text)]
    assert len(done) == len(set(done)) == count, "each cell was run by one process"
    assert not list(folder.glob("home/cells/*/train/final/*.safetensors")), "nobody needs a model any more"

    (archive,) = pack(folder, tmp_path / "back.tar.xz")
    with tarfile.open(archive) as opened:
        cells = {name.split("/")[2] for name in opened.getnames() if name.startswith("home/cells/")}
    assert len(cells) == count
    home = Home(tmp_path / "home", f"sqlite:///{tmp_path / 'store.db'}", "sqlite://")
    store = ResultStore(home.store_url)
    with unpacked(archive) as back:
        found = ingest(store, home, back)
    assert (found.recorded, found.unfinished, list(found.failed)) == (stages, 0, [])
    assert store.fsck() == []
    keys = {state.variant: state.cell_key for state in store.work(NAME)}
    forge = loads(store.cell_body(keys["SparseForge (improved)"]))
    assert forge.recipe.model == Trained(recipe=next(iter(grid.entries)).recipe.model.recipe)  # type: ignore[attr-defined]
    results = Results(home.store_url)
    made = make_tables(results, NAME, tmp_path / "out", only=["table-2"])
    assert not made.missing.get("table-2"), "nothing is absent"
    assert "SparseForge (improved)" in (tmp_path / "out" / "tables" / "table-2.md").read_text()
    page = "\n".join(section(results, NAME, planned_study(results, NAME)))
    assert f"{stages} of {stages} stages of grid `{NAME}` are done" in page
    assert re.search(r"Its pretraining on 0 M tokens took 0\.\d minutes at [\d,]+ tokens a second \(cpu\)", page)
    assert re.search(r"\| Pretraining of the model \| 0 M \| [\d,]+ \| \d\.\d\d \| \d\.\d\d \| \d \| cpu \|", page)
    assert "absent" not in page.partition("Its pretraining")[2], "every row is in"
    results.close()
    assert {suite.name for suite in TEXTS} == {"books-1024", "wikitext2-1024"}
