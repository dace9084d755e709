"""How long products take on a GPU: medians of CUDA graphs over weights that do not fit the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

COLD = 200 * 2**20
"""Bytes of weights that are rotated through, four times the L2 cache of an H100."""

CALLS = 24
"""Calls in one graph, so that its own launch is not what is measured."""


def seconds(calls: Sequence[Callable[[], object]], *, replays: int = 11, least: int = CALLS) -> float:
    """Median seconds of one call: all are captured in turn, again and again, in one graph, which is replayed.

    Each call should use a weight of its own, so that none is found in the cache; `least` calls make one graph.
    """
    rounds = -(-least // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # torch's own is of the GPU that captured first
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    took: list[float] = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) / 1e3 / (rounds * len(calls)))
    return statistics.median(took)


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes per second, read and written, of a large copy on the device, the driver's or a kernel's."""
    source = torch.randint(0, 2**31 - 1, (size // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copies = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    return 2 * size / min(seconds([copy], replays=5, least=6) for copy in copies)
