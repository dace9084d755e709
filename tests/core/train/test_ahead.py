"""Batches come in order whoever loads them, and what loading raises is raised at its own step."""

from __future__ import annotations

import threading

import pytest
import torch

from sparseforge_core.errors import DataError
from sparseforge_core.train.ahead import Ahead

CPU = torch.device("cpu")


def test_batches_are_those_of_their_steps_and_each_is_loaded_once() -> None:
    loaded: list[int] = []

    def load(step: int) -> torch.Tensor:
        loaded.append(step)
        return torch.full((2, 3), step)

    with Ahead(load, CPU, last=5) as ahead:
        for step in (2, 3, 4, 5):  # a resumed run begins anywhere
            assert ahead.batch(step).eq(step).all()
    assert loaded == [2, 3, 4, 5]  # and none after the last


def test_the_next_batch_is_loaded_while_the_step_runs() -> None:
    asked = threading.Event()

    def load(step: int) -> torch.Tensor:
        if step == 2:
            asked.set()
        return torch.zeros(1)

    with Ahead(load, CPU, last=2) as ahead:
        ahead.batch(1)
        assert asked.wait(timeout=60)


def test_an_error_of_loading_comes_at_its_step() -> None:
    def load(step: int) -> torch.Tensor:
        if step == 2:
            raise DataError("the file is gone")
        return torch.zeros(1)

    with Ahead(load, CPU, last=3) as ahead:
        ahead.batch(1)
        with pytest.raises(DataError, match="gone"):
            ahead.batch(2)
