"""Where benchmarks/decode.py runs, and the rows that it reports: printed as they come, merged into a file."""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sparseforge_core.runtime.decode import plain
from sparseforge_core.runtime.kernels.measure import copy_bandwidth

BARS = {
    "decode_over_strong_dense.128_128": 1.52,
    "decode_over_strong_dense.128_1024": 1.52,
    "decode_over_strong_dense.1024_128": 1.52,
    "decode_over_strong_dense.1024_1024": 1.52,
    "decode_tokens_per_second.128_128": 320.0,
    "prefill_over_dense.end_to_end": 1.20,
    "resident_memory_ratio": 0.585,
}
"""What issue 8 asks for; the last is a bound from above."""


@dataclass
class Report:
    """Rows of the results, in the order in which they were measured."""

    hardware: str
    command: str
    commit: str
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the file held of this machine and commit, for ratios of what several runs measured."""
    failed: list[str] = field(default_factory=list)

    def add(self, measure: str, value: float, unit: str, spread: Sequence[float] = ()) -> None:
        """One figure; `spread` are the repeats that it is the median of."""
        row = {
            "measure": measure,
            "value": float(f"{value:.6g}"),
            "unit": unit,
            "bar": BARS.get(measure),
            "hardware": self.hardware,
            "command": self.command,
            "commit": self.commit,
        }
        if len(spread) > 1:
            row |= {"n": len(spread), "stderr": float(f"{statistics.stdev(spread) / len(spread) ** 0.5:.3g}")}
        self.rows[measure] = row
        print(f"{measure:<52}{row['value']:>14,.5g} {unit}", flush=True)

    def value(self, measure: str) -> float | None:
        """A figure measured before."""
        row = self.rows.get(measure, self.earlier.get(measure))
        return None if row is None else float(row["value"])

    def recall(self, path: Path | None) -> None:
        """Remember what a file holds of this machine and commit."""
        if path is not None and path.is_file():
            found = [row for row in json.loads(path.read_text()) if row.get("hardware") == self.hardware]
            self.earlier = {row["measure"]: row for row in found if row["commit"] == self.commit}

    def ratio(self, measure: str, of: str, to: str) -> None:
        """`of` over `to`, where both were measured."""
        above, below = self.value(of), self.value(to)
        if above is not None and below:
            self.add(measure, above / below, "times")

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Do a part; what goes wrong in it is printed and remembered, and the others go on."""
        began = time.perf_counter()
        try:
            work()
        except Exception:  # noqa: BLE001 - one part must not cost the others their results
            traceback.print_exc()
            self.failed.append(name)
        print(f"[{name}: {time.perf_counter() - began:.1f} s]", flush=True)

    def save(self, path: Path | None) -> None:
        """Merge into a file: rows of the same measure are replaced, others stay."""
        if path is None:
            return
        there = {row["measure"]: row for row in json.loads(path.read_text())} if path.is_file() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(list((there | self.rows).values()), indent=1) + "\n")


class Machine:
    """Where it runs: how time is taken, and which small operations are used."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.cuda = self.device.type == "cuda"
        self.steps: ModuleType = plain
        if self.cuda:
            from sparseforge_core.runtime.decode import fast

            self.steps = fast

    @property
    def hardware(self) -> str:
        """As it stands in results."""
        found = torch.cuda.get_device_name(self.device) if self.cuda else f"CPU, {torch.get_num_threads()} threads"
        return f"{found}, torch {torch.__version__}"

    def seconds(self, work: Callable[[], Any]) -> float:
        """Wall time of `work` and everything that it queues."""
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began

    def launched(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Seconds until the host has queued `work`, and until the device has done it."""
        self.synchronize()
        began = time.perf_counter()
        work()
        queued = time.perf_counter() - began
        self.synchronize()
        return queued, time.perf_counter() - began

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Without Python's collector, which may stop the host for tens of milliseconds while the device waits."""
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def graphed(self, work: Callable[[], Any], replays: int = 5) -> float:
        """Median seconds of `work` without the host: as a CUDA graph where there is one."""
        work()
        if not self.cuda:
            return statistics.median(self.seconds(work) for _ in range(replays))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        graph.replay()
        return statistics.median(self.seconds(graph.replay) for _ in range(replays))

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a large copy."""
        if self.cuda:
            return copy_bandwidth()
        source = torch.empty(2**21, dtype=torch.int32, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.graphed(lambda: target.copy_(source))

    def free(self) -> None:
        """Let go of what nothing holds any more."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
