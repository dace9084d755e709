"""Bundles on borrowed machines: shared by processes, past failures, within a time, and home without the weights."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import re
import shutil
import subprocess
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from analysis.make_tables import make_tables
from analysis.study_report import report
from flows import grids
from flows.bundle import Only, choose, write_bundle
from flows.cli import main as cli
from flows.grids.planned import Grid, Planned, expand
from flows.grids.smoke import tiny_smoke
from flows.home import Home
from flows.ingesting import ingest
from flows.remaking import restore_models
from flows.unpacking import unpacked
from sparseforge_core import bundles, files, measured
from sparseforge_core.bundle_processes import LOGS
from sparseforge_core.bundle_run import CLAIMS, CROWDED, POLL, TRAIN, Walk, Work
from sparseforge_core.errors import BundleError, CellsFailed, CheckpointMismatch
from sparseforge_core.evaluate.suites import PerplexitySuite
from sparseforge_core.execution import Execution
from sparseforge_core.identity import cell_key, loads
from sparseforge_core.methods import FrozenMask
from sparseforge_core.objective import Distill
from sparseforge_core.opening import open_finished, weights_identity
from sparseforge_core.packing import pack
from sparseforge_core.recipe import Cell, Trained
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.store.results import Results
from sparseforge_core.store.store import ResultStore
from sparseforge_core.tracking.tracker import read_journal
from tests.there import command, environment, run_there

pytestmark = pytest.mark.slow
TOO_WIDE = PerplexitySuite(name="too-wide", text="heldout", window=128, limit=8)
"""The tiny models accept 64 tokens."""


def with_trouble() -> Grid:
    """The tiny grid with a suite that cannot be measured of the dense row, and a row that diverges."""
    grid = tiny_smoke()
    dense, *others = grid.entries
    forge = next(entry for entry in others if entry.variant == "SparseForge")
    burnt = dataclasses.replace(
        forge.recipe, train=dataclasses.replace(forge.recipe.train, lr=WarmupLinear(peak=1e30), clip=1e30)
    )
    entries = (
        dataclasses.replace(dense, suites=(TOO_WIDE, *dense.suites)),
        *others,
        Planned(recipe=burnt, variant="Burnt", suites=forge.suites),
    )
    return dataclasses.replace(grid, entries=entries)


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of that grid after two processes have shared it, each dropping models."""
    folder = tmp_path_factory.mktemp("there") / "carried"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grids.GRIDS, "tiny-smoke", with_trouble)
        assert write_bundle(choose(["tiny-smoke"]), folder) == 5
    ended = subprocess.run(
        command(folder, "--processes", "2", "--drop-models", "--seconds", "500", "--train-at-once", "1"),
        env=environment(folder),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 2, ended.stderr
    failed = r"CellsFailed: 1 of 5 cells failed, all others went on: .*-s0: too-wide-\w+: DataError"
    last = ended.stderr.splitlines()[-1]
    assert len(re.findall(failed, last)) == 1, "what both processes say is said once"
    assert last.startswith("CellsFailed: 2 of 2 processes failed: ")
    logs = [(folder / bundles.HOME / LOGS / f"cpu-{number}.log").read_text() for number in (1, 2)]
    assert all(re.search(failed, text) for text in logs)
    done = [key for text in logs for key in re.findall(r"cell (\S+) done", text)]
    assert len(done) == len(set(done)) == 4, "each cell was run by one process"
    return folder


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(grids.GRIDS, "tiny-smoke", with_trouble)


def home_in(root: Path) -> Home:
    return Home(root / "home", f"sqlite:///{root / 'store.db'}", "sqlite://")


def folder_of(folder: Path, variant: str) -> Path:
    """The folder of the cell of a variant."""
    key = next(cell.key for cell in expand(with_trouble()).cells if cell.variant == variant)
    return folder / "home" / "cells" / key


def test_a_cell_that_fails_stops_no_other_and_is_said(troubled: Path) -> None:
    dense = folder_of(troubled, "Dense")
    (said,) = (files.read_json(path) for path in (dense / "failures").iterdir())
    assert said["stage"].startswith("too-wide-")
    assert "window=128, and the model accepts at most 64 tokens" in said["error"]
    measured_ = {path.parent.name.partition("-")[0] for path in dense.glob(f"*/{measured.FILE}")}
    assert measured_ == {TRAIN, "heldout"}, "the suite after the one that failed was measured"
    for variant in ("Wanda", "SparseForge", "Burnt"):
        assert list(folder_of(troubled, variant).glob(f"heldout-*/{measured.FILE}"))
        assert not (folder_of(troubled, variant) / "failures").exists()


def test_who_shares_a_device_trains_in_turn(troubled: Path) -> None:
    trained = []
    for journal in (troubled / "home" / "cells").glob("*/train/journal.jsonl"):
        lines, _ = read_journal(journal)
        times = [line["t"] for line in lines if "loss/task" in line.get("scalars", {})]
        if times:
            trained.append((times[0], times[-1]))
            context = files.read_json(journal.with_name(measured.FILE))["context"]
            assert context["trained_at_once"] == 1
            assert context["waited_seconds"] >= 0
    assert len(trained) >= 2
    trained.sort()
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(trained))


def test_weights_go_when_all_is_measured_and_nobody_waits_for_them(troubled: Path) -> None:
    for variant in ("Wanda", "SparseForge"):
        train = folder_of(troubled, variant) / TRAIN
        assert not (train / "final").exists()
        body = measured.read(train / measured.FILE)
        assert files.sha256(train / "manifest.json") == body["context"]["model_sha256"]
        assert files.read_json(train / "manifest.json")["tensors"]["model.safetensors"]
    # the dense row is not finished: the model that it reads stays, whole
    assert list((folder_of(troubled, "pretraining") / TRAIN / "final").glob("*.safetensors"))
    assert (folder_of(troubled, "Dense") / TRAIN / "final" / "manifest.json").is_file()


def test_the_same_command_again_trains_nothing_again(troubled: Path, tmp_path: Path) -> None:
    shutil.copytree(troubled, tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob(measured.FILE)}
    with pytest.raises(CellsFailed, match="1 of 5 cells failed"):
        run_there(tmp_path / "again", drop_models=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob(measured.FILE)} == before


@pytest.mark.usefixtures("planned")
def test_an_archive_brings_home_all_but_weights(troubled: Path, tmp_path: Path) -> None:
    (archive,) = pack(troubled, tmp_path / "back.tar.xz")
    with tarfile.open(archive) as opened:
        assert not [name for name in opened.getnames() if name.endswith((".safetensors", "config.json"))]
    home = home_in(tmp_path)
    store = ResultStore(home.store_url)
    with unpacked(archive) as folder:
        found = ingest(store, home, folder)
        assert (found.recorded, found.known, found.unfinished) == (9, 0, 1)
        assert re.match(r"\S+-s0, too-wide-\w+: DataError: .*at most 64", found.failed[0])
        again = ingest(store, home, folder)
        assert (again.recorded, again.known) == (0, 9)
    assert not folder.exists()
    assert store.fsck() == []
    store_results = Results(home.store_url)
    made = make_tables(store_results, "tiny-smoke", tmp_path / "out", only=["table-2"])
    assert [name for name, *_ in made.missing["table-2"]] == ["dense"], "all but the suite that failed is in"
    page = report(store_results, "tiny-smoke", store="store.db")
    assert "4 of 5 cells are finished, 9 of 10 stages" in page
    assert re.search(r"\| SparseForge \|.*\| \d+\.\d\d \| [01] \| cpu \|", page), "what it cost, and beside how many"
    store_results.close()
    states = {(state.variant, state.stage.partition("-")[0]): state for state in store.work("tiny-smoke")}
    assert {state.status for place, state in states.items() if place != ("Dense", "too")} == {"done"}
    key = states["SparseForge", TRAIN].cell_key
    (train,) = (attempt for attempt in store.attempts(key) if attempt.stage == TRAIN)
    assert files.sha256(home.cell(key) / TRAIN / "manifest.json") == (train.context or {})["model_sha256"]
    # nothing here says that the model is at hand, and nothing makes another one in its place
    cell = loads(store.cell_body(key))
    with pytest.raises(CheckpointMismatch, match="its weights were dropped once all was measured"):
        open_finished(cell, home.root)
    with pytest.raises(CheckpointMismatch, match="was made on another machine"):
        restore_models(store, home, (cell,), lambda: False)


@pytest.mark.usefixtures("planned")
def test_a_cell_that_is_not_measured_to_its_end_stays_behind(
    troubled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(troubled, tmp_path / "there")
    cell = folder_of(tmp_path / "there", "SparseForge")
    shutil.rmtree(next(cell.glob("heldout-*")))

    def carried(archive: Path) -> set[str]:
        with tarfile.open(archive) as opened:
            return {name.split("/")[2] for name in opened.getnames() if name.startswith("home/cells/")}

    (whole,) = pack(tmp_path / "there", tmp_path / "whole.tar.xz")
    assert f"cell {cell.name} stays behind: its model is not sent and not measured yet by ['heldout']" in caplog.text
    dense = folder_of(troubled, "Dense").name  # has no weights of its own: what is measured of it may come alone
    assert cell.name not in carried(whole)
    assert dense in carried(whole)
    assert len(carried(whole)) == 4
    (partial,) = pack(tmp_path / "there", tmp_path / "partial.tar.xz", partial=True)
    assert carried(partial) == carried(whole) | {cell.name}


@pytest.mark.usefixtures("planned")
def test_a_run_that_diverged_comes_home_as_diverged(troubled: Path, tmp_path: Path) -> None:
    burnt = folder_of(troubled, "Burnt")
    assert "diverged" in measured.read(burnt / TRAIN / measured.FILE)
    home = home_in(tmp_path)
    store = ResultStore(home.store_url)
    ingest(store, home, troubled)
    attempts = {attempt.stage.partition("-")[0]: attempt for attempt in store.attempts(burnt.name)}
    assert {name: attempt.cause for name, attempt in attempts.items()} == {TRAIN: "diverged", "heldout": "diverged"}
    assert read_journal(home.cell(burnt.name) / TRAIN / measured.JOURNAL)[0]


def test_a_large_archive_is_in_parts_and_the_same_each_time(troubled: Path, tmp_path: Path) -> None:
    whole = pack(troubled, tmp_path / "whole.tar.xz")[0].read_bytes()
    parts = pack(troubled, tmp_path / "cut.tar.xz", part_bytes=len(whole) // 3)
    assert [path.name for path in parts] == [f"cut.tar.xz.{number:02d}" for number in range(len(parts))]
    assert len(parts) in (3, 4)
    assert b"".join(path.read_bytes() for path in parts) == whole
    for named in ("cut.tar.xz", "cut.tar.xz.00"):
        with unpacked(tmp_path / named) as folder:
            assert bundles.read_bundle(folder).entries
    parts[1].unlink()
    with pytest.raises(BundleError, match=r"cut\.tar\.xz\.01 is missing"), unpacked(parts[0]):
        pass
    assert pack(troubled, tmp_path / "cut.tar.xz")[0].name == "cut.tar.xz"
    assert len(list(tmp_path.glob("cut.*"))) == 1, "parts of before are gone"


def archive_with(path: Path, name: str, kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:xz") as archive:
        about = tarfile.TarInfo(name)
        about.size, about.type, about.linkname = 2, kind, "/etc/passwd"
        archive.addfile(about, io.BytesIO(b"{}"))
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../bundle.json", tarfile.REGTYPE),
        ("/bundle.json", tarfile.REGTYPE),
        ("home/cells/0123456789ab-s0/../measurements.json", tarfile.REGTYPE),
        ("home/cells/0123456789ab-s0/train/final/model.safetensors", tarfile.REGTYPE),
        ("code/sparseforge_core/run.py", tarfile.REGTYPE),
        ("bundle.json", tarfile.SYMTYPE),
        ("bundle.json", tarfile.LNKTYPE),
        ("bundle.json", tarfile.DIRTYPE),
    ],
)
def test_an_archive_with_anything_else_in_it_is_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    archive = archive_with(tmp_path / "foreign.tar.xz", name, kind)
    with pytest.raises(BundleError, match="which is no file of a bundle's results"), unpacked(archive):
        pass


def test_an_archive_that_is_cut_off_or_none_is_refused(troubled: Path, tmp_path: Path) -> None:
    (archive,) = pack(troubled, tmp_path / "back.tar.xz")
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(BundleError, match="cannot be read as an archive of results"), unpacked(archive):
        pass
    archive.write_text("not an archive")
    with pytest.raises(BundleError, match="cannot be read as an archive of results"), unpacked(archive):
        pass
    assert cli(["--home", str(tmp_path), "ingest", str(tmp_path / "nowhere.tar.xz")]) == 2


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda train: (train / "manifest.json").write_text("{}"), "is not that of the model that was measured"),
        (lambda train: (train / "manifest.json").unlink(), "was not copied with its manifest"),
        (lambda train: (train / "journal.jsonl").write_text(""), r"journal\.jsonl is missing or was altered"),
    ],
)
def test_a_dropped_model_is_believed_only_by_its_manifest(
    troubled: Path, tmp_path: Path, damage: object, sentence: str
) -> None:
    shutil.copytree(troubled, tmp_path / "back")
    damage(folder_of(tmp_path / "back", "SparseForge") / TRAIN)  # type: ignore[operator]
    home = home_in(tmp_path)
    with pytest.raises(BundleError, match=sentence):
        ingest(ResultStore(home.store_url), home, tmp_path / "back")
    assert not (home.root / "cells").exists()


def never(*_: object) -> None:
    raise AssertionError("nothing is to be started")


def test_no_cell_is_started_that_would_not_end_in_time(tmp_path: Path) -> None:
    write_bundle(choose(["tiny-smoke"]), tmp_path / "carried")
    bundle = bundles.read_bundle(tmp_path / "carried")
    home = tmp_path / "carried" / "home"
    assert run_there(tmp_path / "carried", seconds=0.0) == home / "cells"
    assert not (home / "cells").exists()
    work = Work(train=never, measure=never, should_stop=lambda: False)
    walk = Walk(bundle.entries, bundle.entries, home / "cells", work, seconds=100.0)
    for entry in bundle.entries:  # twice the tokens: 198 s; what trains nothing has a cell of its own kind
        of = entry.cell.recipe.train.tokens
        walk.took[f"like {of}"] = (99.0 if of else 101.0, of // 2)
    walk.go()
    assert set(walk.left) == set(walk.late) == {cell_key(entry.cell) for entry in bundle.entries}


def test_a_short_cell_after_a_long_one_is_expected_to_take_a_part_of_it(tmp_path: Path) -> None:
    write_bundle(choose(["tiny-smoke"]), tmp_path / "carried")
    bundle = bundles.read_bundle(tmp_path / "carried")
    work = Work(train=never, measure=never, should_stop=lambda: False)
    (first, *_) = bundle.entries
    tokens = first.cell.recipe.train.tokens
    for took, of, late in ((300.0, tokens, True), (300.0, 2 * tokens, True), (300.0, 100 * tokens, False)):
        walk = Walk(bundle.entries, bundle.entries, tmp_path / "cells", work, seconds=100.0)
        walk.took["another"] = (took, of)
        walk.took["one-shot"] = (9999.0, 0)  # says nothing of one that trains
        assert walk._is_late(cell_key(first.cell), first) is late
        assert walk.late == ({cell_key(first.cell): took * tokens / of} if late else {})


def test_what_other_processes_took_counts_and_what_lies_there_from_before_does_not(tmp_path: Path) -> None:
    write_bundle(choose(["tiny-smoke"]), tmp_path / "carried")
    run_there(tmp_path / "carried")
    bundle = bundles.read_bundle(tmp_path / "carried")
    cells = tmp_path / "carried" / "home" / "cells"
    work = Work(train=never, measure=never, should_stop=lambda: False)
    tokens = max(entry.cell.recipe.train.tokens for entry in bundle.entries)
    after = Walk(bundle.entries, bundle.entries, cells, work, seconds=100.0)
    assert after._expected(tokens) == 0.0
    beside = Walk(bundle.entries, bundle.entries, cells, work, seconds=100.0)
    beside.began = 0.0  # as if it had been at work all the while
    once = beside._expected(tokens)
    assert once > 0.0
    assert beside._expected(3 * tokens) == pytest.approx(3 * once)


def test_memory_that_ran_out_beside_others_is_tried_again_with_fewer_and_fails_alone(tmp_path: Path) -> None:
    write_bundle(choose(["tiny-smoke"]), tmp_path / "carried")
    bundle = bundles.read_bundle(tmp_path / "carried")
    home = tmp_path / "carried" / "home"
    first, second = (cell_key(entry.cell) for entry in bundle.entries[:2])
    beside: dict[str, list[int]] = collections.defaultdict(list)

    def train(cell: Cell, companions: int) -> None:
        beside[cell_key(cell)].append(companions)
        raise torch.OutOfMemoryError("CUDA out of memory")

    work = Work(train=train, measure=never, should_stop=lambda: False)
    entries = [entry for entry in bundle.entries if cell_key(entry.cell) in (first, second)]
    walk = Walk(bundle.entries, entries, home / "cells", work)
    with ThreadPoolExecutor() as pool:
        with files.held(home / CLAIMS / second, seconds=0):  # as another process would
            going = pool.submit(walk.go)
            crowded = home / CROWDED / f"{first}.json"
            while not crowded.exists() and not going.done():
                time.sleep(0.05)
            time.sleep(3 * POLL)
            assert beside == {first: [1]}
            assert files.read_json(crowded)["others"] == 1
            assert not (home / "cells" / first / "failures").exists()
        with pytest.raises(CellsFailed, match="2 of 2 cells failed"):
            going.result()
    assert beside == {first: [1, 0], second: [0]}


def test_cells_of_another_bundle_with_the_same_home_are_beside_a_cell_too(tmp_path: Path) -> None:
    write_bundle(choose(["tiny-smoke"]), tmp_path / "carried")
    entries, home = bundles.read_bundle(tmp_path / "carried").entries, tmp_path / "carried" / "home"
    walk = Walk(entries, entries, home / "cells", Work(train=never, measure=never, should_stop=lambda: False))
    own = cell_key(entries[0].cell)
    assert walk._companions(own) == 0
    with files.held(home / CLAIMS / own, seconds=0), files.held(home / CLAIMS / "0123456789ab-s7", seconds=0):
        assert walk._companions(own) == 1
    assert walk._companions(own) == 0


@pytest.mark.usefixtures("planned")
def test_what_was_measured_of_another_model_than_the_recorded_one_is_left_out(troubled: Path, tmp_path: Path) -> None:
    shutil.copytree(troubled, tmp_path / "first")
    suite = next(folder_of(tmp_path / "first", "SparseForge").glob("heldout-*"))
    shutil.rmtree(suite)
    home = home_in(tmp_path)
    store = ResultStore(home.store_url)
    assert ingest(store, home, tmp_path / "first").recorded == 8
    write_bundle(choose(["tiny-smoke"]), tmp_path / "second")
    with pytest.raises(CellsFailed):
        # gradients added up in another order: another model under the same key, as on another machine
        run_there(tmp_path / "second", execution=Execution(micro_batch=1))
    found = ingest(store, home, tmp_path / "second")
    assert (found.recorded, found.other) == (0, 1)
    assert [a.stage for a in store.attempts(suite.parent.name)] == [TRAIN]


@pytest.mark.usefixtures("planned")
def test_what_stands_on_a_pretraining_that_was_made_anew_is_left_out(troubled: Path, tmp_path: Path) -> None:
    shutil.copytree(troubled, tmp_path / "first")
    pretraining = folder_of(tmp_path / "first", "pretraining").name
    for folder in (tmp_path / "first" / "home" / "cells").iterdir():
        if folder.name != pretraining:
            shutil.rmtree(folder)
    home = home_in(tmp_path)
    store = ResultStore(home.store_url)
    assert ingest(store, home, tmp_path / "first").recorded == 1
    assert ingest(store, home, troubled).recorded == 8, "the same pretraining: all that stands on it is taken"
    other = home_in(tmp_path / "other")
    store = ResultStore(other.store_url)
    assert ingest(store, other, tmp_path / "first").recorded == 1
    write_bundle(choose(["tiny-smoke"]), tmp_path / "second")
    with pytest.raises(CellsFailed):
        run_there(tmp_path / "second", execution=Execution(micro_batch=1))  # another model under the same key
    found = ingest(store, other, tmp_path / "second")
    assert (found.recorded, found.known, found.other) == (0, 1, 8)


def test_a_pupil_comes_home_though_its_teacher_was_trained_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tiny_smoke()
    wanda = next(entry for entry in grid.entries if entry.variant == "Wanda")
    assert isinstance(wanda.recipe.model, Trained)
    control = wanda.recipe.model.recipe
    taught = Distill(teacher=Trained(recipe=control, seed=None))
    pupil = dataclasses.replace(control, method=FrozenMask(), pattern=nm(2, 4), objective=taught)
    entries = [
        Planned(recipe=recipe, variant=variant, seeds=(1,), suites=wanda.suites)
        for recipe, variant in ((control, "Control"), (pupil, "Pupil"))
    ]
    monkeypatch.setitem(grids.GRIDS, "tiny-smoke", lambda: dataclasses.replace(grid, entries=tuple(entries)))
    home = home_in(tmp_path)
    store = ResultStore(home.store_url)
    write_bundle(choose(["tiny-smoke"], only=Only(variants=("Control",))), tmp_path / "first")
    run_there(tmp_path / "first")
    assert ingest(store, home, tmp_path / "first").recorded == 2
    write_bundle(choose(["tiny-smoke"]), tmp_path / "second")
    run_there(tmp_path / "second", execution=Execution(micro_batch=1))  # another control under the same key
    found = ingest(store, home, tmp_path / "second")
    assert (found.recorded, found.other) == (2, 0), "the control's suites are known, the pupil's are new"
    (done,) = (a for a in store.attempts(cell_key(Cell(recipe=pupil, seed=1))) if a.stage == TRAIN)
    there = tmp_path / "second" / "home"
    assert (done.context or {})["teacher"] == weights_identity(Cell(recipe=control, seed=1), there)


@pytest.mark.usefixtures("planned")
def test_the_command_line_packs_and_ingests(troubled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparseforge_core.run import main

    assert main(["pack", str(troubled), str(tmp_path / "back.tar.xz")]) == 0
    assert main(["pack", str(troubled), str(tmp_path / "back.zip")]) == 2
    capsys.readouterr()
    assert cli(["--home", str(tmp_path / "home"), "ingest", str(tmp_path / "back.tar.xz"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["recorded"], said["other"], len(said["failed"])) == (9, 0, 1)
    assert (
        cli(["--home", str(tmp_path / "home"), "bundle", "tiny-smoke", "--missing", "--out", str(tmp_path / "b")]) == 2
    )
    assert "has no cell with all that was asked for" in capsys.readouterr().err
