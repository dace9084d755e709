"""Who computes on which devices: one drain at a time on each, whatever set it wants, and never beyond its life."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows.devices import reserved
from flows.local import _workers_of, served_here
from flows.worker import share_machine

ROOT = Path(__file__).resolve().parents[2]


def test_overlapping_sets_take_turns_and_disjoint_ones_do_not_wait(tmp_path: Path) -> None:
    said: list[str] = []
    order: list[str] = []
    began = threading.Event()

    def all_of_them() -> None:
        with reserved(tmp_path, ["1", "0", "2"], lambda name: (said.append(name), began.set())):
            order.append("all")

    with reserved(tmp_path, ["1"], said.append), reserved(tmp_path, ["3"], said.append):
        assert said == []
        other = threading.Thread(target=all_of_them)
        other.start()
        assert began.wait(10)
        order.append("one")
    other.join(10)
    assert (said, order) == (["1"], ["one", "all"])


def test_a_holder_that_is_killed_lets_go(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from flows.devices import reserved
with reserved(Path({str(tmp_path)!r}), ["0"], print):
    print("held", flush=True)
    input()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    said: list[str] = []
    with reserved(tmp_path, ["0"], said.append):
        assert said == []
    holder.communicate()


@pytest.mark.parametrize(
    ("index", "of", "seen"), [(0, 1, "0,1,2,3"), (0, 2, "0"), (1, 2, "1"), (5, 8, "1")], ids=["alone", "a", "b", "more"]
)
def test_one_of_several_workers_sees_one_gpu_and_one_alone_sees_all(
    index: int, of: int, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    share_machine(index, of)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_a_pool_of_several_gpus_has_one_worker_and_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    assert [_workers_of(pool) for pool in (None, "cpu", "gpu-1", "gpu-8")] == [8, 8, 8, 1]
    assert [served_here(pool) for pool in ("cpu", "gpu-1", "gpu-8")] == [True, True, False]
