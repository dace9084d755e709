"""Files and folders that are whole or not there: full disks, deletions that end half way, seals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparseforge_core import files, measured
from sparseforge_core.errors import CheckpointMismatch

FULL = """
import resource, signal, sys
from pathlib import Path
from sparseforge_core import files

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    files.write_text(Path(sys.argv[1]), "new" * 1000)
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.parametrize("room", [0, 1, 2999, 3000])
def test_a_file_that_does_not_fit_is_left_as_it_was(tmp_path: Path, room: int) -> None:
    """The kernel itself refuses the write, as on a full disk."""
    file = tmp_path / "f"
    file.write_text("old")
    command = [sys.executable, "-c", FULL, str(file), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    fits = room >= 3000
    assert done.stdout == ("" if fits else "File too large\n")
    assert file.read_text() == ("new" * 1000 if fits else "old")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def whole(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "weights").write_text("w")
    return folder


def half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleting a folder ends after its first file, as for a process that is killed there."""

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if Path(folder).is_dir():
            next(p for p in sorted(Path(folder).rglob("*")) if p.is_file()).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)


def test_a_folder_whose_deletion_ends_half_way_is_gone_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = whole(tmp_path / "step-00000050")
    with monkeypatch.context() as patch:
        half_way(patch)
        with pytest.raises(KeyboardInterrupt):
            files.remove_folder(folder)
    assert not folder.exists()
    assert len(list(tmp_path.iterdir())) == 1
    files.remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []
    files.remove_folder(folder)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = whole(tmp_path / "final")
    with files.new_folder(folder) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "weights").write_text("new")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*")) if p.is_file()] == ["final/inner/weights"]
    with pytest.raises(ZeroDivisionError), files.new_folder(folder) as temporary:
        raise ZeroDivisionError
    assert (folder / "inner" / "weights").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_seal_fits_what_was_sealed_and_nothing_else() -> None:
    body = json.loads(json.dumps(files.seal({"a": 1, "b": [1.5, None], "c": "\u00e4"})))
    assert files.seal_fits(body)
    for changed in ({**body, "a": 2}, {**body, "d": 0}, {k: v for k, v in body.items() if k != "a"}, {"a": 1}, {}):
        assert not files.seal_fits(changed)


def stage(folder: Path, **more: Any) -> Path:
    folder.mkdir()
    for name, text in more.pop("files", {}).items():
        (folder / name).write_text(text)
    return measured.write(folder, {"cell": "c", "stage": "train", "suite": None, "context": {}, "measurements": []})


def test_a_stage_knows_the_journal_and_the_items_behind_its_numbers(tmp_path: Path) -> None:
    path = stage(tmp_path / "train", files={"journal.jsonl": '{"step":1}\n', "items.jsonl": "{}\n"})
    assert measured.read(path)["stage"] == "train"
    for name in ("journal.jsonl", "items.jsonl"):
        before = (tmp_path / "train" / name).read_text()
        (tmp_path / "train" / name).write_text(before + "\n")
        with pytest.raises(CheckpointMismatch, match=rf"{name} is missing or was altered; delete .*train to make it"):
            measured.read(path)
        (tmp_path / "train" / name).write_text(before)


def test_a_stage_of_before_there_were_seals_is_read_and_a_broken_seal_is_not_one(tmp_path: Path) -> None:
    path = stage(tmp_path / "train")
    body = json.loads(path.read_text())
    old = {k: v for k, v in body.items() if k not in (files.SEAL, "journal_sha256")} | {"format": 1}
    path.write_text(json.dumps(old))
    assert measured.read(path) == old
    for broken in ({**old, "format": 2}, {**old, "sha256 ": body[files.SEAL]}, [], None):
        path.write_text(json.dumps(broken))
        with pytest.raises(CheckpointMismatch, match=r"was altered: its content does not give its hash; delete"):
            measured.read(path)
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointMismatch, match="cannot be read"):
        measured.read(path)


def test_whoever_has_a_file_to_itself_clears_away_what_killed_writers_left(tmp_path: Path) -> None:
    ours, folder, other = (tmp_path / name for name in (".a.json.77.tmp", ".a.json.78.tmp", ".b.json.77.tmp"))
    ours.write_text("torn")
    (folder / "deep").mkdir(parents=True)
    other.write_text("somebody else's")
    with files.only_one(tmp_path / "a.json"):
        files.write_text(tmp_path / "a.json", "whole")
    assert not ours.exists()
    assert not folder.exists()
    assert other.exists()
    assert (tmp_path / "a.json").read_text() == "whole"


def test_whether_a_folder_is_held_is_asked_without_holding_it(tmp_path: Path) -> None:
    assert not files.is_held(tmp_path / "stage")
    with files.held(tmp_path / "stage", seconds=0):
        assert files.is_held(tmp_path / "stage")
        assert files.is_held(tmp_path / "stage"), "asking took nothing"
    assert not files.is_held(tmp_path / "stage")
    with files.held(tmp_path / "stage", seconds=0):
        pass
