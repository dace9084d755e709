"""Turns to train on a device that processes share."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from sparseforge_core.errors import Interrupted, RecipeError
from sparseforge_core.turns import Turns

CPU = torch.device("cpu")


def at_work_together(turns: Turns, count: int) -> tuple[int, list[float]]:
    """The most of so many that were inside at once, and how long each had waited."""
    inside, most, waits, guard = 0, 0, list[float](), threading.Lock()

    def one() -> None:
        nonlocal inside, most
        with turns.turn(CPU) as waited:
            with guard:
                inside += 1
                most = max(most, inside)
                waits.append(waited)
            time.sleep(0.3)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most, sorted(waits)


@pytest.mark.parametrize("at_once", [1, 2])
def test_so_many_train_at_once_and_all_get_their_turn(tmp_path: Path, at_once: int) -> None:
    most, waits = at_work_together(Turns(tmp_path / "turns", at_once), 3)
    assert most == at_once
    assert len(waits) == 3
    assert waits[0] < 0.3 <= waits[-1] + 0.01


def test_one_that_is_asked_to_stop_waits_no_longer(tmp_path: Path) -> None:
    turns = Turns(tmp_path, 1)
    with turns.turn(CPU), pytest.raises(Interrupted, match="before its turn"), turns.turn(CPU, lambda: True):
        raise AssertionError("it had a turn")
    with turns.turn(CPU, lambda: True) as waited:
        assert waited < 0.1


def test_a_turn_ends_with_what_fails_in_it(tmp_path: Path) -> None:
    turns = Turns(tmp_path, 1)
    with pytest.raises(ValueError, match="burnt"), turns.turn(CPU):
        raise ValueError("burnt")
    with turns.turn(CPU) as waited:
        assert waited < 0.1


def test_none_at_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--train-at-once 0"):
        Turns(tmp_path, 0)
