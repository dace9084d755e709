"""Batches loaded one step ahead, in a thread, so that no step waits for one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor


class Ahead:
    """The batches of `load`, which is a function of the step alone: asking for a step begins to load the next."""

    def __init__(self, load: Callable[[int], Tensor], device: torch.device, last: int) -> None:
        self.load, self.device, self.last = load, device, last
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Tensor]] | None = None

    def batch(self, step: int) -> Tensor:
        """The batch of `step` on the device. What loading raises is raised here, at the step that it was loaded for."""
        waiting = self._next if self._next is not None and self._next[0] == step else None
        found = waiting[1].result() if waiting is not None else self._loaded(step)
        self._next = (step + 1, self._pool.submit(self._loaded, step + 1)) if step < self.last else None
        return found.to(self.device, non_blocking=True)

    def _loaded(self, step: int) -> Tensor:
        batch = self.load(step)
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
