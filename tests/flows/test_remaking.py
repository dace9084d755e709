"""A model that was recorded and is gone: made again to the bit, or refused; the cells that read it go on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.cycle import TRAIN, execute_stage
from sparseforge_core import files, measured
from sparseforge_core.errors import CheckpointMismatch
from tests.flows.test_cycle import ORIGIN, Workspace


def values(path: Path) -> dict[str, Any]:
    return {m["metric"]: m["value"] for m in measured.read(path)["measurements"]}


def test_a_model_that_is_gone_is_made_again_for_the_cells_that_read_it(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    space.execute(space.first)
    manifest = space.home.cell(space.first) / TRAIN / "final" / "manifest.json"
    digest = files.sha256(manifest)
    shutil.rmtree(manifest.parent)
    space.execute(space.dense)
    shutil.rmtree(manifest.parent)
    space.execute(space.dense, space.suite)
    assert files.sha256(manifest) == digest
    assert [a.status for a in space.store.attempts(space.first)] == ["done"], "it was recorded once"
    straight = Workspace(tmp_path / "straight")
    for cell, stage in ((straight.first, TRAIN), (straight.dense, TRAIN), (straight.dense, straight.suite)):
        straight.execute(cell, stage)
    ours, theirs = (s.home.cell(s.dense) / s.suite / measured.FILE for s in (space, straight))
    assert values(ours) == values(theirs)


def test_a_model_that_comes_out_otherwise_is_refused(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    space.execute(space.first)
    folder = space.home.cell(space.first) / TRAIN
    body = json.loads((folder / measured.FILE).read_text())
    del body[files.SEAL]
    body["context"]["model_sha256"] = "0" * 64
    files.write_json(folder / measured.FILE, files.seal(body))
    other = Workspace(tmp_path / "other")
    shutil.copytree(space.home.root / "cells", other.home.root / "cells")
    other.execute(other.first)  # recorded from the disk, with the hash of another model
    shutil.rmtree(other.home.cell(other.first) / TRAIN / "final")
    with pytest.raises(CheckpointMismatch, match="gave another one than the recorded one"):
        other.execute(other.dense)
    assert other.status(other.dense) == "failed"


def test_a_model_that_was_made_on_another_machine_is_asked_for_and_not_made_again(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    elsewhere = replace(ORIGIN, host="elsewhere")
    execute_stage(space.store, space.home, space.first, TRAIN, elsewhere)
    folder = space.home.cell(space.first) / TRAIN / "final"
    shutil.rmtree(folder)
    with pytest.raises(CheckpointMismatch, match=f"was made on elsewhere and is not in {folder}; copy that folder"):
        space.execute(space.dense)
    assert not folder.exists()
