"""Devices are held by one drain at a time, whatever set each of them wants, and never for longer than it lives."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from flows.devices import reserved

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
