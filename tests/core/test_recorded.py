"""Work that is done again: plain until its tensors have stayed, recorded then, and plain again where one has moved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sparseforge_core.recorded import WARM, Again, on_gpu


class Doubling:
    """Work on one tensor, and who did it."""

    def __init__(self) -> None:
        self.tensor = torch.ones(3)
        self.done: list[str] = []

    def work(self) -> None:
        self.tensor.mul_(2.0)
        self.done.append("plain")

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        assert work == self.work
        self.done.append("recorded")
        recorded = self.tensor

        def replay() -> None:
            recorded.mul_(2.0)
            self.done.append("replayed")

        return replay


def test_work_is_recorded_once_its_tensors_have_stayed() -> None:
    doubling = Doubling()
    again = Again(doubling.work, doubling.capture)
    for times in range(1, WARM + 3):
        again([doubling.tensor])
        assert doubling.tensor.tolist() == [2.0**times] * 3
    recorded = ["plain"] * WARM + ["recorded", "replayed"]
    assert doubling.done == [*recorded, "replayed"]
    doubling.done.clear()
    moved, doubling.tensor = doubling.tensor, torch.ones(3)
    for _ in range(WARM + 1):
        again([doubling.tensor])
    assert doubling.done == recorded
    assert doubling.tensor.tolist() == [2.0 ** (WARM + 1)] * 3
    assert moved.tolist() == [2.0 ** (WARM + 2)] * 3
    doubling.done.clear()
    again.forget()
    again([doubling.tensor])
    assert doubling.done == ["plain"]


def test_without_a_capture_work_is_always_plain() -> None:
    doubling = Doubling()
    again = Again(doubling.work, None)
    for _ in range(2 * WARM):
        again([doubling.tensor])
    assert doubling.done == ["plain"] * (2 * WARM)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_does_what_the_work_does() -> None:
    tensor = torch.ones(3, device="cuda")

    def work() -> None:
        tensor.mul_(2.0).add_(1.0)

    again = Again(work, on_gpu)
    for times in range(1, WARM + 4):
        again([tensor])
        assert tensor.tolist() == [2.0 ** (times + 1) - 1.0] * 3
