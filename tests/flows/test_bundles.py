"""Cells that travel: what a bundle carries and refuses to, the job array, and an ingest that believes nothing."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import functools
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import cycle, grids, ingesting
from flows.bundle import choose, write_bundle
from flows.bundle_data import copy_measured
from flows.cycle import ready
from flows.grids import grid_named
from flows.grids.planned import Grid, expand
from flows.grids.smoke import tiny_smoke
from flows.home import Home
from flows.ingesting import Ingested, ingest
from flows.provenance import provenance
from sparseforge_core import bundles, files, measured
from sparseforge_core.bundle_status import status
from sparseforge_core.checkpoint import verify
from sparseforge_core.data.corpora import TextFiles
from sparseforge_core.errors import BundleError, CellTaken, DataError, FolderHeld, RecipeError
from sparseforge_core.evaluate.suites import WIKITEXT2_2048, HarnessSuite, Suite
from sparseforge_core.run import main
from sparseforge_core.store.store import ResultStore
from tests.flows.command import GRID, register
from tests.there import run_there

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the whole tiny grid that has been run."""
    folder = tmp_path_factory.mktemp("there") / "carried"
    assert write_bundle(choose(["tiny-smoke"]), folder) == 4
    run_there(folder)
    return folder


class Here:
    """The machine that the bundle comes back to: a copy of it, an empty store."""

    def __init__(self, carried: Path, root: Path) -> None:
        self.folder = root / "back"
        shutil.copytree(carried, self.folder)
        self.home = Home(root / "home", f"sqlite:///{root / 'store.db'}", "sqlite://")
        self.store = ResultStore(self.home.store_url)

    def ingest(self) -> Ingested:
        return ingest(self.store, self.home, self.folder)

    def recorded(self) -> int:
        return sum(state.status == "done" for state in self.store.work("tiny-smoke"))

    def stage(self, name: str = "train") -> Path:
        """The folder of a stage of a cell that needs another one, whose model is its own."""
        found = [p for p in sorted((self.folder / "home" / "cells").glob(f"*/{name}*")) if p.is_dir()]
        return next(p for p in found if name != "train" or list(p.glob("final/*.safetensors")))


@pytest.fixture
def here(carried: Path, tmp_path: Path) -> Here:
    return Here(carried, tmp_path)


def test_what_was_made_elsewhere_is_recorded_once_and_its_models_stay(here: Here) -> None:
    assert here.ingest() == Ingested(recorded=7, known=0, unfinished=0)
    assert here.ingest() == Ingested(recorded=0, known=7, unfinished=0)
    assert here.store.fsck() == []
    attempts = [a for s in here.store.work("tiny-smoke") for a in here.store.attempts(s.cell_key)]
    assert {a.status for a in attempts} == {"done"}
    assert {a.provenance.device for a in attempts} == {"cpu"}
    states = here.store.work("tiny-smoke")
    assert {s.status for s in states} == {"done"}
    assert ready(states) == []
    key = next(s.cell_key for s in states if s.method == "sparseforge")
    verify(here.home.cell(key) / "train" / "final", key)


@pytest.mark.parametrize(("form", "changes"), [(3, "f" * 64), (3, ""), (2, "")])
def test_an_attempt_elsewhere_is_of_the_code_that_the_bundle_carried(here: Here, form: int, changes: str) -> None:
    """Whatever the checkout that records it is by then; a bundle of the format before is read too."""
    path = here.folder / "bundle.json"
    body = json.loads(path.read_text())
    assert body["format"] == bundles.FORMAT
    assert body["code"] == provenance().git_sha
    body |= {"format": form, "code": "0123abc", "changes": changes}
    if form == 2:
        del body["changes"]
    files.write_json(path, files.seal({name: value for name, value in body.items() if name != files.SEAL}))
    here.ingest()
    attempts = [a for s in here.store.work("tiny-smoke") for a in here.store.attempts(s.cell_key)]
    assert {
        (a.provenance.git_sha, a.provenance.dirty, a.provenance.diff_sha, a.provenance.lock_sha) for a in attempts
    } == {("0123abc", bool(changes), changes, "")}
    assert {a.provenance.python for a in attempts} == {platform.python_version()}


def test_an_ingest_does_not_write_beside_a_process_that_still_writes(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingesting, "FOLDER_SECONDS", 0.1)
    key = here.stage().parent.name
    with (
        files.held(here.home.cell(key) / "train", seconds=1.0),
        pytest.raises(FolderHeld, match="is still being written"),
    ):
        here.ingest()
    recorded = here.recorded()
    assert here.ingest() == Ingested(recorded=7 - recorded, known=recorded, unfinished=0)


def test_a_bundle_that_is_half_done_is_ingested_in_two_goes(here: Here, tmp_path: Path) -> None:
    suite = here.stage("heldout")
    suite.rename(tmp_path / "not yet")
    assert here.ingest() == Ingested(recorded=6, known=0, unfinished=1)
    (tmp_path / "not yet").rename(suite)
    assert here.ingest() == Ingested(recorded=1, known=6, unfinished=0)


def edit(path: Path, change: Callable[[dict[str, object]], object], *, sealed: bool = False) -> None:
    """Change a JSON file by hand, with a seal that fits if its writer knows how."""
    body = json.loads(path.read_text())
    change(body)
    if sealed:
        del body[files.SEAL]
        body = files.seal(body)
    path.write_text(json.dumps(body))


def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 4
    path.write_bytes(bytes(body))


def link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def outward(here: Here) -> None:
    """A manifest that names a file outside, with every hash as it should be."""
    manifest = here.stage() / "final" / "manifest.json"
    (here.stage() / "secret").write_text("s")
    names = {"../secret": files.sha256(here.stage() / "secret")}
    edit(manifest, lambda body: body["files"].update(names), sealed=True)  # type: ignore[attr-defined]
    digest = files.sha256(manifest)
    edit(here.stage() / "measurements.json", lambda b: b["context"].update(model_sha256=digest), sealed=True)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda h: flip(h.stage() / "measurements.json"), r"was altered|cannot be read"),
        (lambda h: edit(h.stage() / "measurements.json", lambda b: b["measurements"][0].update(value=1)), "altered"),
        (lambda h: edit(h.stage() / "measurements.json", lambda b: b.update(format=3), sealed=True), "has format 3"),
        (lambda h: edit(h.stage() / "measurements.json", lambda b: b.update(cell="x"), sealed=True), "is of cell x"),
        (lambda h: flip(h.stage() / "journal.jsonl"), "journal.jsonl is missing or was altered"),
        (lambda h: flip(h.stage() / "final" / "model.safetensors"), r"altered \(tensor .*\); delete"),
        (lambda h: (h.stage() / "final" / "config.json").unlink(), "config.json is missing"),
        (lambda h: flip(h.stage() / "final" / "manifest.json"), "is not the model that was measured"),
        (lambda h: shutil.rmtree(h.stage() / "final"), "was not copied with its manifest"),
        (lambda h: link(h.stage() / "final" / "model.safetensors"), "is a link"),
        (lambda h: link(h.stage()), "is a link"),
        (lambda h: link(h.folder / "home" / "cells"), "is a link"),
        (outward, r"names a file '\.\./secret', which leads out of its folder"),
        (lambda h: (h.folder / "home" / "cells" / "0123456789ab-s0").mkdir(), "is of no cell of this bundle"),
        (lambda h: flip(h.folder / "bundle.json"), r"was altered|cannot be read|is no bundle|format"),
        (lambda h: (h.folder / "bundle.json").write_text('{"cells": []}'), "is no bundle of SparseForge"),
        (lambda h: (h.folder / "bundle.json").unlink(), "cannot be read as a bundle"),
        (lambda h: edit(h.folder / "bundle.json", lambda b: b.update(format=1)), "has bundle format 1, this version"),
        (lambda h: edit(h.folder / "bundle.json", lambda b: b.update(grids=["x"]), sealed=True), "not known here"),
    ],
)
def test_what_came_back_otherwise_is_refused_and_nothing_is_recorded(
    here: Here, damage: Callable[[Here], object], sentence: str
) -> None:
    damage(here)
    with pytest.raises(BundleError, match=sentence):
        here.ingest()
    assert here.recorded() == 0
    assert not (here.home.root / "cells").exists()


def test_a_disk_that_gives_nothing_while_a_bundle_is_checked(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256", unreadable)
        with pytest.raises(BundleError, match=r"cannot be read: .*Input/output error: .*\. Nothing was recorded"):
            here.ingest()
    assert here.recorded() == 0
    assert here.ingest() == Ingested(recorded=7, known=0, unfinished=0)


# ---------------------------------------------------------------- between the check and the record


def while_copying(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[Path], object], *, after: bool) -> None:
    """Do something once, with the bundle's file, just before or after the ingest copies the first of this name."""
    copy, left = shutil.copyfile, [act]

    def copyfile(source: Path, target: Path, **more: bool) -> None:
        ours = source.name == name and bool(left)
        if ours and not after:
            left.pop()(source)
        copy(source, target, **more)
        if ours and after:
            left.pop()(target)

    monkeypatch.setattr(ingesting.shutil, "copyfile", copyfile)


def other_measurements(path: Path) -> None:
    """Another result of the same stage, sealed as it should be: as if the cell had been run again there."""
    edit(path, lambda body: body["measurements"][0].update(value=1.5), sealed=True)  # type: ignore[index]


def shortened(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "act", "after"),
    [
        ("measurements.json", flip, False),
        ("measurements.json", other_measurements, False),
        ("measurements.json", shortened, True),
        ("journal.jsonl", flip, False),
        ("journal.jsonl", lambda path: path.unlink(), False),
        ("items.jsonl", flip, False),
        ("model.safetensors", flip, False),
        ("model.safetensors", shortened, True),
        ("model.safetensors", link, False),
        ("manifest.json", flip, False),
    ],
)
def test_what_changes_between_check_and_record_is_not_recorded_and_the_next_ingest_is_whole(
    here: Here, monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[Path], object], after: bool
) -> None:
    sound = here.folder.with_name("sound")
    shutil.copytree(here.folder, sound)
    with monkeypatch.context() as patch:
        while_copying(patch, name, act, after=after)
        with pytest.raises(BundleError, match=r"is not what it was when it was checked: .* was not recorded"):
            here.ingest()
    whole(here, sound)


def whole(here: Here, sound: Path) -> None:
    """Nothing of the stage that went wrong is there; the bundle as it was is then ingested to the end."""
    before, states = here.recorded(), here.store.work("tiny-smoke")
    failed = [s for s in states if s.status == "failed"]
    assert [(s.status, s.attempts) for s in failed] == [("failed", 1)]
    assert not (here.home.cell(failed[0].cell_key) / failed[0].stage).exists()
    assert list(here.home.root.rglob("*.tmp")) == []
    shutil.rmtree(here.folder)
    sound.rename(here.folder)
    assert here.ingest() == Ingested(recorded=7 - before, known=before, unfinished=0)
    assert here.store.fsck() == []


def test_a_disk_that_is_full_while_an_ingest_copies(
    here: Here, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The kernel refuses what goes beyond so many bytes of a file: the model is larger, all else is smaller."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2))
    sound = here.folder.with_name("sound")
    shutil.copytree(here.folder, sound)
    room = here.stage().joinpath("final", "model.safetensors").stat().st_size - 1

    def fill(_: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    while_copying(monkeypatch, "model.safetensors", fill, after=False)
    with pytest.raises(BundleError, match=r"could not be copied to .*File too large.*\. It was not recorded; "):
        here.ingest()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    whole(here, sound)


def test_a_long_ingest_says_that_it_is_alive(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycle, "HEARTBEAT_SECONDS", 0.02)
    key = here.stage().parent.name
    beats: list[object] = []

    def wait(_: Path) -> None:
        deadline = time.monotonic() + 20
        while len(set(beats)) < 3 and time.monotonic() < deadline:
            running = [a for s in here.store.work("tiny-smoke") for a in here.store.attempts(s.cell_key)]
            beats.extend(a.heartbeat for a in running if a.status == "running")
            time.sleep(0.02)

    while_copying(monkeypatch, "model.safetensors", wait, after=False)
    assert here.ingest() == Ingested(recorded=7, known=0, unfinished=0)
    assert len(set(beats)) >= 3, f"no heartbeat of {key} came while it was copied"


def test_an_ingest_whose_claim_was_given_away_records_nothing(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = here.folder.with_name("sound")
    shutil.copytree(here.folder, sound)
    expire = functools.partial(here.store.expire, datetime.timedelta(seconds=-1))
    while_copying(monkeypatch, "model.safetensors", lambda _: expire(), after=False)
    with pytest.raises(CellTaken, match="no longer the live one"):
        here.ingest()
    before = here.recorded()
    assert here.ingest() == Ingested(recorded=7 - before, known=before, unfinished=0)
    assert here.store.fsck() == []


def test_cells_of_other_code_are_not_planned_here(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed() -> Grid:
        grid = tiny_smoke()
        entries = tuple(
            dataclasses.replace(e, recipe=dataclasses.replace(e.recipe, corpus=TextFiles(paths=("a",), sha256=("b",))))
            for e in grid.entries
        )
        return dataclasses.replace(grid, entries=entries)

    monkeypatch.setitem(grids.GRIDS, "tiny-smoke", changed)
    with pytest.raises(BundleError, match="is not planned here: no grid of tiny-smoke has that recipe"):
        here.ingest()
    assert here.recorded() == 0


def test_a_cell_is_named_by_the_beginning_of_its_key_and_brings_what_it_needs(tmp_path: Path) -> None:
    plan = expand(grid_named("tiny-smoke"))
    last = plan.cells[-1]
    chosen = choose([last.key[:6]])
    assert list(chosen.cells) == [*last.requires, last.key]
    assert chosen.levels() == {last.requires[0]: 0, last.key: 1}
    assert write_bundle(chosen, tmp_path / "one") == 2
    names = [entry.cell.recipe.method.kind for entry in bundles.read_bundle(tmp_path / "one").entries]  # type: ignore[attr-defined]
    assert names == ["dense-control", "sparseforge"]
    for name, sentence in (("0" * 12, "no grid has a cell"), (last.key[:3], "at least 4 characters")):
        with pytest.raises(RecipeError, match=sentence):
            choose([name])
    with pytest.raises(RecipeError, match="grid demo has no cell whose key begins"):
        choose([last.key], grid="demo")


def test_what_a_bundle_cannot_carry_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="the packaged model smollm2-135m; lm-eval with the tasks of suite"):
        write_bundle(choose(["smollm2-smoke"]), tmp_path / "carried")
    assert not (tmp_path / "carried").exists()
    assert write_bundle(choose(["smollm2-smoke"]), tmp_path / "carried", there=True) == 3
    assert len(json.loads((tmp_path / "carried" / "bundle.json").read_text())["there"]) == 2


def of_files(monkeypatch: pytest.MonkeyPatch, *paths: Path | str) -> None:
    """Make the tiny grid read local files."""
    corpus = TextFiles.of(*paths)

    def changed() -> Grid:
        grid = tiny_smoke()
        entries = tuple(
            dataclasses.replace(e, recipe=dataclasses.replace(e.recipe, corpus=corpus)) for e in grid.entries
        )
        return dataclasses.replace(grid, entries=entries)

    monkeypatch.setitem(grids.GRIDS, "tiny-smoke", changed)


def test_the_files_of_a_corpus_travel_if_they_are_the_ones_in_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"The {n} foxes see {n + 1} dogs by the river.\n<|endoftext|>\n" for n in range(300))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "own.txt").write_text(text)
    monkeypatch.setenv("SPARSEFORGE_DATA", str(tmp_path))
    of_files(monkeypatch, "texts/own.txt")
    write_bundle(choose(["tiny-smoke"]), tmp_path / "carried")
    assert (tmp_path / "carried" / "data" / "texts" / "own.txt").read_text() == text
    (tmp_path / "texts" / "own.txt").write_text(text[1:])
    with pytest.raises(DataError, match=r"texts/own\.txt is not the one in the recipe"):
        write_bundle(choose(["tiny-smoke"]), tmp_path / "again")
    monkeypatch.setenv("SPARSEFORGE_DATA", "/nowhere")
    monkeypatch.delenv("SPARSEFORGE_DATA")
    run_there(tmp_path / "carried")
    of_files(monkeypatch, tmp_path / "texts" / "own.txt")
    with pytest.raises(BundleError, match="which lies outside of the data folder"):
        write_bundle(choose(["tiny-smoke"]), tmp_path / "absolute")


def test_a_text_that_is_another_one_there_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "carried"
    write_bundle(choose(["smollm2-smoke"]), folder, there=True)
    edit(
        folder / "bundle.json",
        lambda b: b["corpora"][0]["identity"].update(versions={"python": "2.7"}),  # type: ignore[index]
        sealed=True,
    )
    with pytest.raises(BundleError, match=r"corpus python-docs: this machine has .*Install the same versions"):
        run_there(folder)


def test_status_says_how_far_each_cell_is(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    def states() -> list[str]:
        return [line.state for line in status(here.folder)]

    assert states() == ["finished"] * 4
    cells = here.folder / "home" / "cells"
    model, *lines = status(here.folder)
    assert not model.results  # a pretraining, by no suite
    for line in lines:
        suite, value = next(iter(line.results.items()))
        rows = measured.read(next(cells.glob(f"{line.key}/{suite}-*/measurements.json")))["measurements"]
        assert value == next(row["value"] for row in rows if row["metric"] == "perplexity")
        assert line.step == line.steps
    stopped, failed, held = (cells / line.key for line in lines)
    for folder in (stopped, failed, held):
        shutil.rmtree(next(path for path in folder.iterdir() if path.name.startswith("heldout")))
    files.write_json(failed / "failures" / "heldout.json", {"cell": "", "stage": "heldout", "error": "no room"})
    shutil.rmtree(cells / model.key)
    with files.held(here.folder / "home" / "claims" / held.name, seconds=0):
        assert states() == ["waiting", "stopped", "failed", "at work"]
        assert main(["status", str(here.folder)]) == 0
        shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[:4]] == [line.key for line in (model, *lines)]
    assert "heldout: no room" in shown[2]
    assert shown[4] == "1 waiting, 1 stopped, 1 failed, 1 at work"
    assert main(["status", str(here.folder), "--json"]) == 0
    assert [line["state"] for line in json.loads(capsys.readouterr().out)][3] == "stopped"
    (here.folder / "bundle.json").unlink()
    assert main(["status", str(here.folder)]) == 2
    assert "cannot be read as a bundle" in capsys.readouterr().err


def test_an_index_that_the_bundle_lacks_is_refused(carried: Path) -> None:
    with pytest.raises(BundleError, match="--index 4: the bundle has cells 0 to 3"):
        run_there(carried, index=4)


class Array:
    """The script of a job array, run by bash as SLURM would, on a Python that has torch and transformers alone."""

    SITE = """
import sys
from importlib.machinery import PathFinder

ABSENT = {"sqlalchemy", "alembic", "psycopg", "pandas", "mlflow", "prefect", "lm_eval", "datasets", "scipy", "pyarrow"}


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""

    def __init__(self, folder: Path, root: Path) -> None:
        (root / "absent").mkdir()
        (root / "absent" / "sitecustomize.py").write_text(self.SITE)
        # SLURM itself is the one thing that is not here: what the script asks of it is written down.
        (root / "bin").mkdir()
        (root / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {root}/scontrol.txt\n')
        (root / "bin" / "scontrol").chmod(0o755)
        self.folder, self.root = folder, root
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SPARSEFORGE")},
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(root / "absent"),
            "SPARSEFORGE_PYTHON": sys.executable,
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_ARRAY_JOB_ID": "77",
        }

    def start(self, index: int) -> subprocess.Popen[str]:
        # SLURM runs a copy of the script from a folder of its own.
        spool = shutil.copy(self.folder / "array.sh", self.root / "slurm_script")
        environment = {**self.environment, "SLURM_ARRAY_TASK_ID": str(index)}
        return subprocess.Popen(
            ["bash", spool], env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


@pytest.mark.slow
def test_a_job_array_is_stopped_requeued_finished_and_brought_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grids.GRIDS, GRID, None)  # type: ignore[arg-type]  # put back after the test
    register()
    folder = tmp_path / "carried"
    write_bundle(choose([GRID]), folder, slurm=True)
    submit = (folder / "submit.sh").read_text()
    assert '--array=0-0 "$@" array.sh' in submit
    assert '--array=1-1 --dependency="afterok:$job" "$@" array.sh' in submit
    array = Array(folder, tmp_path)
    job = array.start(0)
    deadline = time.monotonic() + 120
    while not list(folder.glob("home/cells/*/train/checkpoints/step-*/manifest.json")):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.terminate()  # what --signal=B:TERM@120 does: the shell alone gets it
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0, said
    assert "run the same command again to go on from here" in said
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77_0\n"
    job = array.start(0)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    home = Home(tmp_path / "home", f"sqlite:///{tmp_path / 'store.db'}", "sqlite://")
    assert ingest(ResultStore(home.store_url), home, folder) == Ingested(recorded=1, known=0, unfinished=2)


def test_the_templates_hold_no_secret_and_are_valid_shell() -> None:
    for script in sorted((ROOT / "infra" / "slurm").iterdir()):
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
        assert "password" not in script.read_text().lower()
    assert "--signal=B:TERM@120" in (ROOT / "infra" / "slurm" / "array.sh").read_text()


def test_items_of_tasks_and_wikitext_travel_and_are_read_there_as_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseforge_core.evaluate.perplexity import wikitext2_test
    from sparseforge_core.evaluate.stock_tasks import stock_task

    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki" / "wiki.test.raw").write_text(" \n = Title = \n \n Words . \n")
    for name in ("SPARSEFORGE_TASKS", "SPARSEFORGE_DATA"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SPARSEFORGE_WIKITEXT2", str(tmp_path / "wiki"))
    tasks = ("arc_easy", "hellaswag", "lambada_openai")
    limit = 3
    here = {task: stock_task(task, limit).documents(limit) for task in tasks}
    text = wikitext2_test()
    suites: list[Suite] = [HarnessSuite(name="few", tasks=tasks, limit=limit), WIKITEXT2_2048]
    copy_measured(tmp_path / "carried", suites)
    for path in (tmp_path / "carried" / "data" / "tasks").rglob("*.jsonl"):
        assert len(path.read_text().splitlines()) == limit
    monkeypatch.delenv("SPARSEFORGE_WIKITEXT2")
    bundles.prepare(bundles.Bundle(folder=tmp_path / "carried", code="", changes="", grids=(), entries=(), corpora=()))
    for name in ("SPARSEFORGE_TASKS", "SPARSEFORGE_DATA", "SPARSEFORGE_WIKITEXT2"):
        monkeypatch.setenv(name, os.environ[name])  # gone after the test
    assert wikitext2_test() == text
    for task in tasks:
        opened = stock_task(task, limit)
        assert opened.source == "folder"
        assert [json.dumps(document) for document in opened.documents(limit)] == [json.dumps(d) for d in here[task]]
