"""Folders that are made once: one maker among many, nothing half made, nothing left behind by the killed."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from sparseforge_core.data.cache import content_key, made_once
from sparseforge_core.errors import DataError


def slowly(folder: Path) -> None:
    (folder / "maker").write_text(str(os.getpid()))
    time.sleep(0.3)
    with (folder.parent / "makers").open("a") as log:
        log.write(f"{os.getpid()}\n")


def die(folder: Path) -> None:
    (folder / "half").write_text("half")
    os._exit(9)


def make(folder: Path, how: str) -> None:
    made_once(folder, {"slowly": slowly, "die": die}[how])


def test_of_many_makers_one_makes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make, args=(tmp_path / "made", "slowly")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "makers").read_text().split() == [(tmp_path / "made" / "maker").read_text()]


def test_a_killed_maker_leaves_nothing_that_counts(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=make, args=(tmp_path / "made", "die"))
    process.start()
    process.join(20)
    assert process.exitcode == 9
    assert not (tmp_path / "made").exists()
    assert list(tmp_path.glob("*.tmp"))
    made_once(tmp_path / "made", slowly)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["maker"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failed_maker_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise DataError("no text")

    with pytest.raises(DataError, match="no text"):
        made_once(tmp_path / "made", fail)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_a_key_depends_on_every_part_and_on_no_order() -> None:
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1})
    assert len({content_key(body) for body in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": [1]})}) == 4
