"""Where a training step of a small model spends its time on a GPU: kernels by their role, and the host's share.

python benchmarks/step_profile.py [--cases frozen following annealing] [--parts attention products] [--out DIR]

Steps are those of the product's own loop on random weights and tokens: SmolLM2-135M's shape, 16 x 1024 tokens, full-
vocabulary divergence from a dense teacher. Each case is timed as the host starts its kernels and as a recorded CUDA
graph (`train/recording.py`), which must give the same losses; one window of each is profiled. The parts time single
operations of the step as they are and as they might be. Rows go to step_profile.json in --out or $OUT.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import contextlib
import itertools

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.one_shape import add_options, device_of, say, shape_of
from benchmarks.steps import Shape, bench, release, synchronize
from sparseforge_core.methods import AST, CAST, SRSTE, FrozenMask, MagnitudePruning, MaskLLM, Method, SparseForge
from sparseforge_core.objective import Distill, Objective, TaskOnly
from sparseforge_core.objective.correction import TeacherCorrection
from sparseforge_core.tracking.tracker import NullTracker
from sparseforge_core.train.loop import Progress, train
from sparseforge_core.train.recording import Recording

FILE = "step_profile.json"
FOLLOWING = Distill(kl_weight=0.75, correction=TeacherCorrection())
CASES: dict[str, tuple[Method, Objective]] = {
    "frozen": (FrozenMask(prior=MagnitudePruning()), Distill()),
    "following": (FrozenMask(prior=MagnitudePruning()), FOLLOWING),
    "annealing": (SparseForge(update_every=10), Distill()),
    "ast": (AST(), Distill(kl_weight=0.67)),
    "cast": (CAST(), Distill(kl_weight=1 / 3)),
    "sr-ste": (SRSTE(), Distill()),
    "maskllm": (MaskLLM(prior=None), TaskOnly()),
}
"""Name -> method and objective, as the study has them but for the prior."""

HOWS = ("plain", "recorded")
"""Kernels started by the host one by one, and as a recorded graph."""

WARM, WINDOW, PROFILED = 8, 10, 3
"""Steps before the first that is timed, timed, and profiled."""

ROLES = (
    ("head's losses", r"losses_and_gradient"),
    ("attention, backward", r"flash_bwd|fmha.*(bwd|backward)|sdpa.*(bwd|bprop|backward)|dot_do_o|convert_dq"),
    ("attention, forward", r"flash_fwd|fmha|sdpa"),
    ("optimizer", r"multi_tensor|FusedAdam|fused_adam|adam"),
    ("mask update", r"mask_update|update_masks|gate|threshold|rank"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|splitK|matmul"),
    ("compiled, forward and backward", r"^triton_"),
    ("embedding", r"embedding|indexing_backward|radix|DeviceScan|Sort"),
    ("copies and fills", r"Memcpy|Memset|copy_kernel|FillFunctor"),
)
"""Role -> what the kernels' names contain; the first that matches counts, all else is "other"."""


class _EnoughError(Exception):
    """All steps were seen."""


class LoggedLosses(NullTracker):
    """Keeps the loss of each logged step."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.seen[step] = values["loss/total"]


@dataclasses.dataclass
class Steps:
    """What a run's steps took."""

    seconds: float
    """Of a step."""
    warm_up: float
    losses: dict[int, float]
    kernels: dict[str, tuple[float, int]]
    """Kernel -> device seconds of a step, and starts of it."""
    busy: float
    """Device seconds of a step in which a kernel ran."""
    host: float
    """Seconds that the host spends between two steps' calls, while the device is not waited for."""
    peak_bytes: int


def steps_of(shape: Shape, method: Method, objective: Objective, device: torch.device, *, recorded: bool) -> Steps:
    """Time and profile steps of the product's loop."""
    began = time.perf_counter()
    on_gpu = device.type == "cuda"
    marks: list[float] = []
    calls: list[float] = []
    taken: list[Any] = []
    first, last = WARM + WINDOW, WARM + WINDOW + PROFILED
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    profiler = profile(activities=activities)

    def on_step(progress: Progress) -> None:
        calls.append(time.perf_counter())
        if progress.step in (WARM, first):
            synchronize(device)
            marks.append(time.perf_counter())
        if progress.step == first:
            profiler.start()
        if progress.step == last:
            synchronize(device)
            profiler.stop()
            taken.extend(profiler.events() or [])
            raise _EnoughError

    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    losses = LoggedLosses()
    with tempfile.TemporaryDirectory() as folder:
        made = bench(shape, method, device, compiled=on_gpu, folder=Path(folder), objective=objective)
        run = dataclasses.replace(made.run, tracker=losses, log_every=10)
        if recorded:
            run = dataclasses.replace(run, recording=Recording(made.run.model, made.teacher))
        with contextlib.suppress(_EnoughError):
            train(run, on_step=on_step)
    spans = kernels_of(taken, on_gpu=on_gpu)
    between = [after - before for before, after in zip(calls[WARM : first - 1], calls[WARM + 1 : first], strict=True)]
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    del made, run
    release(device)
    return Steps(
        seconds=(marks[1] - marks[0]) / WINDOW,
        warm_up=marks[0] - began,
        losses=losses.seen,
        kernels=totals(spans),
        busy=covered([(begin, end) for _, begin, end in spans]) / PROFILED,
        host=min(between),
        peak_bytes=peak,
    )


def kernels_of(events: list[Any], *, on_gpu: bool) -> list[tuple[str, float, float]]:
    """Name, begin and end in seconds of what ran on the device."""
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    return [
        (event.name, 1e-6 * event.time_range.start, 1e-6 * event.time_range.end)
        for event in events
        if event.device_type == kind
    ]


def totals(spans: list[tuple[str, float, float]]) -> dict[str, tuple[float, int]]:
    """Seconds and starts of each kernel a step, the longest first."""
    seconds: dict[str, float] = collections.defaultdict(float)
    starts: collections.Counter[str] = collections.Counter()
    for name, begin, end in spans:
        seconds[name] += end - begin
        starts[name] += 1
    longest_first = sorted(seconds.items(), key=lambda pair: -pair[1])
    return {name: (s / PROFILED, round(starts[name] / PROFILED)) for name, s in longest_first}


def covered(spans: list[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans ran."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def role(kernel: str) -> str:
    """What a kernel is for, by its name."""
    return next((name for name, pattern in ROLES if re.search(pattern, kernel, re.IGNORECASE)), "other")


def case(name: str, shape: Shape, device: torch.device, hows: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a case in each way, and by how much the ways' losses differ."""
    method, objective = CASES[name]
    found: dict[str, Steps] = {}
    for how in hows if device.type == "cuda" else ("plain",):
        steps = found[how] = steps_of(shape, method, objective, device, recorded=how == "recorded")
        roles: dict[str, float] = collections.defaultdict(float)
        for kernel, (seconds, _) in steps.kernels.items():
            roles[role(kernel)] += seconds
        yield {
            "case": name,
            "how": how,
            "tokens_per_second": shape.tokens / steps.seconds,
            "ms": {
                "step": 1e3 * steps.seconds,
                "device_busy": 1e3 * steps.busy,
                "host": 1e3 * steps.host,
                **{part: 1e3 * seconds for part, seconds in sorted(roles.items(), key=lambda pair: -pair[1])},
            },
            "starts": sum(count for _, count in steps.kernels.values()),
            "warm_up_s": steps.warm_up,
            "peak_gib": steps.peak_bytes / 2**30,
            "losses": steps.losses,
            "kernels": longest(steps.kernels),
        }
    first, *others = found
    for how in others:
        apart = max(abs(loss - found[how].losses[step]) for step, loss in found[first].losses.items())
        yield {"case": name, "between": [first, how], "losses_apart": apart}


def longest(kernels: dict[str, tuple[float, int]], each: int = 9) -> dict[str, list[str]]:
    """The longest kernels of each role: milliseconds and starts of a step, and the name."""
    found: dict[str, list[str]] = {}
    for kernel, (seconds, count) in kernels.items():
        found.setdefault(role(kernel), []).append(f"{1e3 * seconds:.3f} {count:4} {kernel[:90]}")
    return {name: lines[:each] for name, lines in found.items()}


def attention(shape: Shape, device: torch.device) -> Iterator[dict[str, Any]]:
    """Causal attention of a layer, forward and backward, by each kind that torch has."""
    wide = shape.width // shape.heads

    def made(heads: int) -> Tensor:
        rows = torch.randn(shape.sequences, shape.length, heads, wide, device=device, dtype=torch.bfloat16)
        return rows.transpose(1, 2).requires_grad_()

    q, k, v = made(shape.heads), made(shape.kv_heads), made(shape.kv_heads)
    slope = torch.randn_like(q)
    for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        for grouped in (True, False):
            row = {"part": "attention", "kind": kind.name, "grouped": grouped}
            inputs = [q, k, v] if grouped else [q, *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))]
            try:
                with sdpa_kernel(kind):
                    seconds = attended([x.detach().requires_grad_() for x in inputs], slope, device, grouped=grouped)
            except RuntimeError as error:
                yield {**row, "refused": str(error)[:120]}
                continue
            yield {**row, "ms_all_layers": {name: 1e3 * s * shape.layers for name, s in seconds.items()}}


def attended(inputs: list[Tensor], slope: Tensor, device: torch.device, *, grouped: bool) -> dict[str, float]:
    """Seconds of causal attention of queries, keys and values, there and back."""

    def forward() -> Tensor:
        return nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=grouped)

    out = forward()
    back = timed(lambda: torch.autograd.grad(out, inputs, slope, retain_graph=True), device)
    return {"forward": timed(forward, device), "backward": back}


def products(shape: Shape, device: torch.device) -> Iterator[dict[str, Any]]:
    """A block's matrix products in bfloat16: one by one, and with those of one input together."""
    kv = shape.width // shape.heads * shape.kv_heads
    width, ffn = shape.width, shape.ffn
    sides = {
        **dict.fromkeys("qo", (width, width)),
        **dict.fromkeys("kv", (kv, width)),
        **dict.fromkeys(("gate", "up"), (ffn, width)),
        "down": (width, ffn),
        "qkv": (width + 2 * kv, width),
        "gate+up": (2 * ffn, width),
        "head": (shape.vocabulary, width),
    }
    for name, (out, inputs) in sides.items():
        tokens = shape.tokens // 4 if name == "head" else shape.tokens
        x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
        w = torch.randn(out, inputs, device=device, dtype=torch.bfloat16)
        g = torch.randn(tokens, out, device=device, dtype=torch.bfloat16)
        found = {
            "forward": timed(lambda x=x, w=w: x @ w.t(), device),
            "to input": timed(lambda g=g, w=w: g @ w, device),
            "to weight": timed(lambda g=g, x=x: g.t() @ x, device),
        }
        flops = 2.0 * tokens * out * inputs
        yield {"part": "products", "matrix": name, "us": {k: 1e6 * s for k, s in found.items()},
               "tflops": {k: flops / s / 1e12 for k, s in found.items()}}  # fmt: skip


def timed(work: Callable[[], Any], device: torch.device, times: int = 10) -> float:
    """Seconds of device time of `work`, the median of several with the host ahead; of all time on a CPU."""
    for _ in range(2):
        work()
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    torch.cuda._sleep(4_000_000)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    synchronize(device)
    return statistics.median(1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(marks))


PARTS = {"attention": attention, "products": products}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=["frozen", "following"])
    parser.add_argument("--hows", nargs="+", choices=HOWS, default=list(HOWS))
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    add_options(parser, FILE)
    options = parser.parse_args(arguments)
    device, shape = device_of(options), shape_of(options)
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for source in (
        *(PARTS[name](shape, device) for name in options.parts),
        *(case(name, shape, device, options.hows) for name in options.cases),
    ):
        for row in source:
            say(rows, {**row, "at_s": round(time.perf_counter() - began, 1)}, options, FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
