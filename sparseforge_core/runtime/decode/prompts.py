"""How a prompt is passed through the model: filled up to one of few sizes, as one CUDA graph where that comes again.

A prompt of 2,048 tokens is some 500 kernels, which a host may take longer to launch than the device to run. A graph
costs a capture and holds memory, so the first prompt of a size is launched kernel by kernel, the second is too and
captures, and from the third on one launch is all. Each gives the same numbers, as each computes the same rows. A short
prompt of a size that has not come before is filled up to the next size that is recorded, where there is one: to compute
what nobody asked for takes a device less time than to launch a pass takes a host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch

from sparseforge_core.runtime.decode.parts import Parts
from sparseforge_core.runtime.kernels.cusparselt import filled_up
from sparseforge_core.runtime.kernels.support import check_memory, free_memory

log = logging.getLogger(__name__)

BUDGET = 2**30
"""Bytes that the graphs of one decoder's prompts may hold on the device: beyond, all are let go and begun anew."""

SHORT = 1024
"""Rows up to which a pass is sooner computed than launched: for LLaMA-2-7B on an H200 16 ms and 20 to 34."""

MOST = 64
"""Graphs of one decoder: their launches lie in the driver's memory, which `BUDGET` does not count."""

Work = Callable[[], None]


class Recorder(Protocol):
    """What turns a pass into one that is replayed."""

    def record(self, work: Work) -> tuple[Work, int]:
        """Do `work` once; what repeats it, and the bytes that this holds beyond what was held before."""
        ...


class Graphs:
    """CUDA graphs with one pool of memory: they run one after the other, and none needs what another left there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, work: Work) -> tuple[Work, int]:
        """Run on the capture's own stream, so that all that is made once per stream, size or plan is there; capture."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # what that pass took of the ordinary pool, which the graph has again in its own
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay, torch.cuda.memory_reserved(self._device) - before


class Prompts:
    """The sizes of one decoder's prompts, and what repeats those that came again."""

    def __init__(
        self, parts: Parts, batch: int, capacity: int, *, fill: bool, recorder: Callable[[], Recorder] | None
    ) -> None:
        """`fill` fills prompts up; `recorder` makes what records them, and None leaves every pass to the host."""
        self._batch, self._capacity, self._fill = batch, capacity, fill
        self._device = parts.embedding.device
        sizes = parts.sizes
        made = 8 * sizes.width + sizes.qkv + sizes.heads * sizes.head + 3 * sizes.wide
        self._row = made * parts.embedding.element_size()
        self._products = {(p.name, p.out, p.inputs): p for p in reversed(parts.products)}.values()
        self._itemsize = parts.embedding.element_size()
        self._make = recorder
        self._recorder: Recorder | None = None
        self._met: set[int] = set()
        self._recorded: dict[int, Work] = {}
        self.held_bytes = 0
        """On the device, by what is recorded; it is memory between products, and no weights."""

    @property
    def recorded(self) -> tuple[int, ...]:
        """The sizes that are repeated in one launch."""
        return tuple(sorted(self._recorded))

    def needed_bytes(self, size: int) -> int:
        """What a pass takes beside weights and cache: every result of one layer, and the weight that a product unpacks.

        Results of different sizes hardly find each other's memory in a pool: for LLaMA-2-7B this is 164 KB a token, and
        graphs of 2,048 to 8,192 tokens took 168 to 177 on an H200. A weight is unpacked where that was measured to be
        the fastest of what its forms allow.
        """
        rows = self._batch * size
        unpacked = (p.out * p.inputs * self._itemsize for p in self._products if p.unpacks(rows))
        return rows * self._row + max(unpacked, default=0)

    def size(self, length: int) -> int:
        """Tokens that are computed for the next prompt, of `length`: 1/16 more at most, or 7, never beyond the cache.

        More where the size is short and new and a larger one of at most SHORT rows is recorded; it is not new any more
        then. Those behind the end are seen by none before them. A prompt too large for a graph is not filled up.
        """
        size = min(filled_up(length), self._capacity)
        if not self._fill or self.needed_bytes(size) > BUDGET:
            return length
        if size in self._met or size in self._recorded:
            return size
        larger = [known for known in self._recorded if size < known <= SHORT // self._batch]
        if not larger:
            return size
        self._met.add(size)
        return min(larger)

    def run(self, size: int, work: Work) -> None:
        """Pass a prompt of a size that `size` gave; `work` does it launch by launch.

        Raises ExportError, before any work, where the device has no memory for what lies between the products.
        """
        if size in self._recorded:
            self._recorded[size]()
            return
        needed = self.needed_bytes(size)
        if size not in self._met:
            check_memory(needed, self._device, f"a pass over {self._batch} x {size} tokens")
        if self._make is None or needed > BUDGET or size not in self._met:
            self._met.add(size)
            work()
            return
        grows = needed if size > max(self._recorded, default=0) else 0  # smaller ones find their memory in the pool
        if self.held_bytes + grows > BUDGET or len(self._recorded) == MOST:
            self.forget()
        if not self._has_room(needed):
            log.info("a prompt of %d tokens is launched kernel by kernel: no memory for its graph", size)
            work()
            return
        self._recorder = self._recorder or self._make()
        self._recorded[size], held = self._recorder.record(work)
        self.held_bytes += held

    def forget(self) -> None:
        """Let go of everything recorded and of its memory, when the device is done with it; sizes met stay met."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._recorded.clear()
        self._recorder, self.held_bytes = None, 0

    def _has_room(self, needed: int) -> bool:
        free = free_memory(self._device)
        return free is None or needed <= free
