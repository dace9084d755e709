"""What one product with a 2:4 weight costs the host that launches it, from the module's call to the driver's.

python benchmarks/host_path.py [--rows 1 64 256 1024] [--ways wide expand ...] [--calls 2000] [--profile]

Each kernel that suits a number of rows is forced in turn and called many times without a wait; a figure is the median
of seven rounds, in microseconds a call. `module` is a `KernelLinear`'s call, `product` is `sparse_linear`, `operator`
the operator of torch that compilers see, `way` what was chosen, with its output made before where that is a kernel of
ours, `launch` the last launch once more, which is the driver's part. The weight is so small that a GPU is done before
the host's next call.

On a GPU the launches are real, and `linear` is torch's own dense product beside them. Without one, the few entries of
the driver and of cuSPARSELt are a function of the C library that does nothing, tensors lie in the host's memory, and
torch's dense product returns an empty tensor: what is timed is Python, ctypes and torch's own bookkeeping. What a
driver does, a GPU's allocator and its guards are not in those figures.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import ctypes
import functools
import pstats
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from sparseforge_core.runtime.kernels import (
    KernelWeight,
    cusparselt,
    expanding,
    nvrtc,
    plans,
    sparse_linear,
    table,
    tensor_map,
)
from sparseforge_core.runtime.kernels.candidates import candidates
from sparseforge_core.runtime.kernels.choices import choose
from sparseforge_core.runtime.kernels.expanding import expand
from sparseforge_core.runtime.kernels.fragments import to_fragments
from sparseforge_core.runtime.kernels.operator import PRODUCT
from sparseforge_core.runtime.kernels.rehearsal import random_packed
from sparseforge_core.runtime.kernels.table import Choice
from sparseforge_core.runtime.linear import KernelLinear

OUT, INPUTS = 256, 1024

PROCESSORS = 132
"""Of the GPU that is not there."""

ROUNDS = 7


def ways(rows: int) -> dict[str, Choice]:
    """One choice of each kind that multiplies so many rows."""
    found: dict[str, Choice] = {}
    for plan in candidates(OUT, INPUTS, rows):
        found.setdefault(plan.kernel, Choice("kernel", plan, seconds=1.0))
    if rows > 1:
        found["expand"] = Choice("expand", seconds=1.0)
        found["dense"] = Choice("dense", seconds=1.0)
        found["cusparselt"] = Choice("cusparselt", seconds=1.0)
    return found


@contextlib.contextmanager
def forced(choice: Choice) -> Iterator[None]:
    """Let the table hold nothing but this choice."""
    with mock.patch.object(table, "line", return_value=(choice,)):
        choose.cache_clear()
        yield
    choose.cache_clear()


@contextlib.contextmanager
def nothing_launched() -> Iterator[None]:
    """In the place of the driver, cuSPARSELt and a dense product: what has their signatures and does nothing."""
    nothing = ctypes.CDLL(None).pthread_equal  # of two different addresses: 0, which is success everywhere
    names = ("StructuredDescriptorInit", "DenseDescriptorInit", "MatmulDescriptorInit", "MatmulAlgSelectionInit",
             "MatmulAlgSetAttribute", "MatmulPlanInit", "MatmulGetWorkspace", "Matmul", "Init")  # fmt: skip
    driver = types.SimpleNamespace(cuLaunchKernelEx=nothing, cuTensorMapEncodeTiled=nothing)
    library = types.SimpleNamespace(**{f"cusparseLt{name}": nothing for name in names})
    properties = types.SimpleNamespace(multi_processor_count=PROCESSORS)

    def load(
        _file: str, _constants: object, threads: int, shared: int, device: int, by_value: tuple[int, ...] = ()
    ) -> nvrtc.Kernel:
        return nvrtc.Kernel(ctypes.c_void_p(1), threads, shared, device, by_value)

    with contextlib.ExitStack() as stack:
        for place, name, instead in (
            (nvrtc, "driver", lambda: driver),
            (tensor_map, "driver", lambda: driver),
            (cusparselt, "_library", lambda: library),
            (plans, "load", load),
            (expanding, "load", functools.cache(load)),
            (torch.nn.functional, "linear", lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], weight.shape[0])),
            (torch.cuda, "get_device_properties", lambda _: properties),
            (torch.cuda, "device", contextlib.nullcontext),
        ):
            stack.enter_context(mock.patch.object(place, name, instead))
        for name, given in (("_cuda_getCurrentRawStream", lambda _: 0), ("_cuda_getDevice", lambda: None)):
            # the index of the CPU's device is None
            stack.enter_context(mock.patch.object(torch._C, name, given, create=True))
        yield


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Median of a call's time, over rounds."""
    took = []
    for _ in range(ROUNDS + 1):  # the first makes what is kept
        began = time.perf_counter()
        for _ in range(calls):
            call()
        took.append((time.perf_counter() - began) / calls * 1e6)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return statistics.median(took[1:])


class Case:
    """A weight in every form, and x."""

    def __init__(self, rows: int, device: str) -> None:
        packed = random_packed(OUT, INPUTS, torch.bfloat16, device)
        self.weight = KernelWeight(*to_fragments(*packed), (OUT, INPUTS), "mma")
        self.dense = torch.zeros(OUT, INPUTS, dtype=torch.bfloat16, device=device)
        self.compressed = self.dense[: OUT * 9 // 16].flatten()
        if device == "cuda":
            self.dense = self.weight.dense()
            self.compressed = cusparselt.compress(self.dense)
        self.module = KernelLinear(self.weight, None)
        self.x = torch.randn(1, rows, INPUTS, device=device).to(torch.bfloat16)  # as a model passes a prompt
        self.y = self.x.new_empty(rows, OUT)

    def stages(self, choice: Choice) -> dict[str, Callable[[], object]]:
        """What is timed of a way."""
        self.weight.dense_copy = self.dense if choice.kind == "dense" else None
        self.weight.compressed = self.compressed if choice.kind == "cusparselt" else None
        found: dict[str, Callable[[], object]] = {
            "module": functools.partial(self.module, self.x),
            "product": functools.partial(sparse_linear, self.x, self.weight, None),
            "operator": functools.partial(
                PRODUCT, self.x, *self.weight.held[:2], None, *self.weight.held[2:4], OUT, "mma"
            ),
            "way": self._way(choice),
        }
        if choice.plan is not None:
            found["way"]()
            kernel, _ = plans._prepared(choice.plan, OUT, INPUTS, len(self.y), self.x.dtype, self.x.device.index)
            found["launch"] = functools.partial(kernel._launch, kernel._frames[-1])
        return found

    def _way(self, choice: Choice) -> Callable[[], object]:
        x, pair = self.x[0], (self.weight.values, self.weight.places)
        if choice.plan is not None:
            return functools.partial(choice.plan.run, x, *pair, None, self.y)
        if choice.kind == "cusparselt":
            return functools.partial(cusparselt.run, x, self.compressed, None, OUT, choice.algorithm)
        if choice.kind == "expand":
            return functools.partial(expand, *pair, (OUT, INPUTS))
        return functools.partial(torch.nn.functional.linear, x, self.dense)

    def linear(self) -> Tensor:
        """The dense product, as a dense model's module calls it."""
        return torch.nn.functional.linear(self.x, self.dense)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 if all ran."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--ways", nargs="+", help="kernels and other ways; all that suit the rows by default")
    parser.add_argument("--calls", type=int, default=2000, help="in a round")
    parser.add_argument("--profile", action="store_true", help="say where the time of a module's call goes")
    options = parser.parse_args(argv)
    there = torch.cuda.is_available()
    with torch.no_grad(), contextlib.nullcontext() if there else nothing_launched():
        print(
            f"# {torch.cuda.get_device_name() if there else 'no GPU: nothing is launched'}, torch {torch.__version__}"
        )
        for rows in options.rows:
            case = Case(rows, "cuda" if there else "cpu")
            if there:
                print(f"rows {rows:5} linear {microseconds(case.linear, options.calls):6.1f} us")
            for name, choice in ways(rows).items():
                if options.ways is None or name in options.ways:
                    _print(case, rows, name, choice, options)
    return 0


def _print(case: Case, rows: int, name: str, choice: Choice, options: Any) -> None:
    with forced(choice):
        stages = case.stages(choice)
        figures = {stage: microseconds(call, options.calls) for stage, call in stages.items()}
        print(f"rows {rows:5} {name:10} " + " ".join(f"{stage} {took:6.1f}" for stage, took in figures.items()) + " us")
        if options.profile:
            profile = cProfile.Profile()
            profile.enable()
            for _ in range(options.calls):
                stages["module"]()
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    sys.exit(main())
