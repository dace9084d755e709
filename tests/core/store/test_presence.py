"""A SQLite store whose file is away, back, copied back or replaced: refused in a sentence, and never split in two."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from sparseforge_core.errors import StoreError
from sparseforge_core.store.results import Results
from sparseforge_core.store.store import ResultStore
from tests.stores import PROVENANCE, plan, planned_cell, value

CELL, OTHER = planned_cell("wanda"), planned_cell("dense")
AWAY = r"store .*store\.db is away: .* Put it back, or mount its disk, .* nothing recorded is lost"
PARTS = ("store.db", "store.db-wal", "store.db-shm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the store is; beside it there is room to put it away."""
    return tmp_path / "home"


@pytest.fixture
def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'store.db'}"


def move(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in PARTS:
        if (source / name).exists():
            os.rename(source / name, target / name)


def test_a_file_that_is_gone_is_missed_and_goes_on_when_it_is_back(url: str, folder: Path, tmp_path: Path) -> None:
    store = ResultStore(url)
    plan(store, [CELL])
    attempt = store.claim(CELL.key, "train", PROVENANCE)
    move(folder, tmp_path / "elsewhere")
    for ask in (
        lambda: store.finish(attempt, [value("loss", 1.0)], {}),
        lambda: store.work("g"),
        lambda: ResultStore(url),
        lambda: ResultStore(url, create=False),
        lambda: Results(url),
    ):
        with pytest.raises(StoreError, match=AWAY):
            ask()
    assert not [name for name in PARTS if (folder / name).exists()], "something was made in its place"
    move(tmp_path / "elsewhere", folder)
    store.finish(attempt, [value("loss", 1.0)], {})
    assert [s.status for s in ResultStore(url).work("g")].count("done") == 1
    assert store.fsck() == []


def test_a_file_that_was_copied_back_is_the_same_store(url: str, folder: Path, tmp_path: Path) -> None:
    store = ResultStore(url)
    plan(store, [CELL])
    store.close()  # so that the copy is whole
    reader = ResultStore(url)
    assert len(reader.work("g")) == 3
    shutil.copy(folder / "store.db", tmp_path / "copy.db")
    (folder / "store.db").unlink()
    shutil.copy(tmp_path / "copy.db", folder / "new.db")
    os.rename(folder / "new.db", folder / "store.db")
    attempt = reader.claim(CELL.key, "train", PROVENANCE)
    with sqlite3.connect(folder / "store.db") as seen:
        assert seen.execute("SELECT id FROM attempt").fetchall() == [(attempt.id,)], "it went into the old file"


def test_another_store_in_its_place_is_not_written(url: str, folder: Path, tmp_path: Path) -> None:
    store = ResultStore(url)
    plan(store, [CELL])
    attempt = store.claim(CELL.key, "train", PROVENANCE)
    move(folder, tmp_path / "elsewhere")
    (folder / "store.db.lock").unlink()  # what somebody does who begins anew
    fresh = ResultStore(url)
    plan(fresh, [CELL, OTHER])
    taken = fresh.claim(OTHER.key, "train", PROVENANCE)
    assert taken.id == attempt.id, "the two stores can be confused"
    with pytest.raises(StoreError, match="is another one than this process began with; put the file back"):
        store.finish(attempt, [value("loss", 9.0)], {})
    fresh.finish(taken, [value("loss", 1.0)], {})
    assert fresh.fsck() == []


def test_where_a_store_must_be_no_folder_is_made(url: str, folder: Path, tmp_path: Path) -> None:
    ResultStore(url).close()
    os.rename(folder, tmp_path / "unmounted")
    with pytest.raises(StoreError, match="is away"):
        ResultStore(url, create=False)
    assert not folder.exists()
    os.rename(tmp_path / "unmounted", folder)
    ResultStore(url, create=False).close()


def test_a_store_of_before_gets_its_number_and_its_mark(url: str, folder: Path) -> None:
    ResultStore(url).close()
    with sqlite3.connect(folder / "store.db") as old:
        old.execute("PRAGMA user_version = 0")
    (folder / "store.db.lock").write_text("")
    ResultStore(url).close()
    with sqlite3.connect(folder / "store.db") as now:
        number = now.execute("PRAGMA user_version").fetchone()[0]
    assert number > 0
    assert "A results store was made here" in (folder / "store.db.lock").read_text()
    ResultStore(url).close()
    with sqlite3.connect(folder / "store.db") as later:
        assert later.execute("PRAGMA user_version").fetchone()[0] == number
