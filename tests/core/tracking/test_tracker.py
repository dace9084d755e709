"""The journal: append-only, readable at any moment, whole again after a crash."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from sparseforge_core.tracking.tracker import Journal, MemoryTracker, NullTracker, read_journal


def _journal(path: Path, steps: int) -> None:
    journal = Journal(path)
    for step in range(1, steps + 1):
        journal.scalars(step, {"loss/total": 10.0 / step})
    journal.close()


def _steps(path: Path) -> list[int]:
    return [line["step"] for line in read_journal(path)[0] if "scalars" in line]


def test_every_kind_of_line_comes_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "journal.jsonl")
    journal.event("phase", {"name": "heating"})
    journal.scalars(1, {"loss/total": 3.5, "loss/kl": math.nan})
    journal.histogram(1, "mask/attention", [0.0, 0.5, 1.0], [3, 4])
    journal.close()
    event, scalars, histogram = read_journal(tmp_path / "deep" / "journal.jsonl")[0]
    assert (event["event"], event["detail"]) == ("phase", {"name": "heating"})
    assert scalars["scalars"] == {"loss/total": 3.5, "loss/kl": None}, "JSON has no NaN; the name stays"
    assert histogram["histogram"] == {"name": "mask/attention", "edges": [0.0, 0.5, 1.0], "counts": [3, 4]}
    assert all("t" in line for line in (event, scalars, histogram))


def test_a_line_is_readable_before_the_journal_is_closed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.scalars(1, {"a": 1.0})
    assert _steps(tmp_path / "journal.jsonl") == [1]
    journal.close()


def test_reading_goes_on_from_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    _journal(path, 2)
    first, offset = read_journal(path)
    assert read_journal(path, offset) == ([], offset)
    _journal(path, 1)
    more, _ = read_journal(path, offset)
    assert [len(first), len(more)] == [2, 1]
    assert read_journal(tmp_path / "absent.jsonl") == ([], 0)


def test_a_torn_last_line_is_left_out_and_found_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    _journal(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    lines, offset = read_journal(path)
    assert [line["step"] for line in lines] == [1, 2]
    path.write_bytes(whole)
    assert [line["step"] for line in read_journal(path, offset)[0]] == [3]


@pytest.mark.parametrize("resume_step", [None, 2])
def test_what_follows_a_torn_line_is_not_lost(tmp_path: Path, resume_step: int | None) -> None:
    path = tmp_path / "journal.jsonl"
    _journal(path, 3)
    path.write_bytes(path.read_bytes()[:-5])
    journal = Journal(path, resume_step=resume_step)
    journal.scalars(3, {"loss/total": 1.0})
    journal.close()
    assert _steps(path) == [1, 2, 3]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    _journal(path, 10)
    offset = path.stat().st_size
    journal = Journal(path, resume_step=4)
    journal.scalars(5, {"loss/total": 1.0})
    journal.close()
    assert _steps(path) == [1, 2, 3, 4, 5]
    assert len(read_journal(path, offset)[0]) == 5, "a reader that was further begins anew"


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path; from sparseforge_core.tracking.tracker import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for step in range(1, 51): journal.scalars(step, {'a': float(step)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert _steps(path) == list(range(1, 51))


def test_one_line_is_one_json_object(tmp_path: Path) -> None:
    _journal(tmp_path / "journal.jsonl", 3)
    for raw in (tmp_path / "journal.jsonl").read_text().splitlines():
        assert set(json.loads(raw)) == {"t", "step", "scalars"}


def test_memory_tracker_finds_a_step_and_null_tracker_keeps_nothing() -> None:
    memory = MemoryTracker()
    for tracker in (memory, NullTracker()):
        tracker.scalars(3, {"a": 1.0})
        tracker.histogram(3, "mask/mlp", [0.0, 1.0], [1])
        tracker.event("phase", {})
        tracker.close()
    assert memory.scalars_at(3) == {"a": 1.0}
    with pytest.raises(KeyError):
        memory.scalars_at(4)
    assert len(memory.lines) == 3
