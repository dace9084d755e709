"""Work of which the host starts every kernel by one call: a CUDA graph, which is recorded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

WARM = 3
"""Times that work is done plain before it is recorded: what is compiled, loaded or tuned at first use must not be."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Turns work into what does it again with the tensors of the first time."""


class Again:
    """Work that changes tensors in place, again and again: recorded when these have stayed where they are.

    A recording holds addresses. Where one has moved, the work is done plain until it has stayed for `WARM` times, and
    recorded anew. Plain and recorded are the same kernels.
    """

    def __init__(self, work: Callable[[], None], capture: Capture | None) -> None:
        """
        Args:
            work: starts kernels and asks the device nothing; what it keeps is overwritten when it is done again.
            capture: what records; None: the work is always done plain.
        """
        self._work, self._capture = work, capture
        self._addresses: list[int] = []
        self._plain = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, tensors: Iterable[Tensor]) -> None:
        """Do the work, which reads and writes these tensors and no others but its own."""
        if self._capture is None:
            self._work()
            return
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._addresses:
            self.forget()
            self._addresses = addresses
        if self._replay is None and self._plain < WARM:
            self._plain += 1
            self._work()
            return
        if self._replay is None:
            self._replay = self._capture(self._work)
        self._replay()

    def forget(self) -> None:
        """Give the recording and its memory back."""
        recorded = self._replay is not None
        self._addresses, self._plain, self._replay = [], 0, None
        if recorded and torch.cuda.is_initialized():
            # A graph's memory is a pool of its own: nothing else finds it until the driver has it back.
            torch.cuda.empty_cache()


def on_gpu(work: Callable[[], None]) -> Callable[[], None]:
    """`work` as a CUDA graph of the current device. Its tensors stay in memory as long as what is returned."""
    return _replay(_graph(work, torch.cuda.Stream()))


def taking_turns() -> Capture:
    """What makes graphs as `on_gpu` does, each in the memory of the first: for work that is never under way at once.

    What one of them leaves in tensors that somebody holds stays as it is; the rest is overwritten by the others.
    """
    first: list[tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]] = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        if first:
            stream, shared = first[0]  # memory of one stream is not given to another
            return _replay(_graph(work, stream, shared.pool()))
        stream = torch.cuda.Stream()
        first.append((stream, _graph(work, stream)))
        return _replay(first[0][1])

    return capture


def _graph(work: Callable[[], None], stream: torch.cuda.Stream, pool: Any = None) -> torch.cuda.CUDAGraph:
    """A stream of the caller's: torch's own for captures is of the GPU that captured first."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Threads that load batches call the driver meanwhile; that is none of the recording's business.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(f"a step could not be recorded as a CUDA graph; run with --no-record: {error}") from error
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> Callable[[], None]:
    replay: Callable[[], None] = graph.replay
    return replay
